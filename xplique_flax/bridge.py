"""JAX functions as TensorFlow operations with gradients of any order."""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf

from . import gpu
from .batches import Batches
from .cpu import Compiled
from .jaxprs import read_arguments

Parameters = Any  # any pytree of arrays
Spec = tuple[list[int | None] | None, tf.DType]


def within(mesh: Any) -> AbstractContextManager[Any]:
    """Return the context of a mesh, if there is one."""
    return nullcontext() if mesh.empty else jax.set_mesh(mesh)


@dataclass(frozen=True)
class Outline:
    """What is known of a function before it gets any values."""

    parameters: Parameters
    cotangents: Sequence[jax.ShapeDtypeStruct]
    """Those of a batch of any size."""
    arrays: Callable[[Sequence[Any]], Sequence[jax.ShapeDtypeStruct]]
    """Returns the arrays that belong to some cotangents."""


class JaxFunction:
    """A jitted function of parameters and arrays, and its pullback.

    Parameters
    ----------
    function
        ``function(parameters, *arrays)``, which returns a tuple of arrays.
    inputs
        For each of the ``arrays``, whether it is floating or complex, and so has a gradient.
    outputs
        The same for what the function returns.
    batches
        In which sizes to run batches, if the batch is the first axis of all arrays.
    outline
        With it, the pullback takes only the arrays whose values it reads.
    cotangents
        How many of the last arrays are cotangents, if the function is a pullback.
    """

    def __init__(
        self,
        function: Callable[..., tuple],
        inputs: Sequence[bool],
        outputs: Sequence[bool],
        batches: Batches | None = None,
        outline: Outline | None = None,
        cotangents: int = 0,
    ) -> None:
        self._function = function
        # TensorFlow calls from threads of its own, where the mesh of the user's thread is not set.
        self._mesh = jax.sharding.get_mesh()
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._batches = batches
        self._outline = outline
        self.jitted = Compiled(function, cotangents)
        self._pullback: JaxFunction | None = None
        self._lock = threading.Lock()

    @property
    def pullback(self) -> JaxFunction:
        """``(parameters, *read, *cotangents)`` to the gradients of those arrays that have one.

        Those of complex numbers are, as TensorFlow has them, the conjugates of JAX's.

        It recomputes the function, so that asking for a gradient costs exactly one forward and
        one backward pass, in one compiled call.
        """
        with self._lock:
            if self._pullback is None:
                with self.mesh():
                    self._pullback = JaxFunction(
                        self._pull_back,
                        inputs=(*self.read_by_pullback(self._inputs), *filter(None, self._outputs)),
                        outputs=(True,) * sum(self._inputs),
                        batches=self._batches and self._batches.of_pullback(),
                        cotangents=sum(self._outputs),
                    )
            return self._pullback

    def __call__(self, parameters: Parameters, *arrays: Any) -> Sequence[Any]:
        """Call the compiled function."""
        with self.mesh():
            if self._batches is None:
                return self.jitted(parameters, *arrays)
            return self._batches.run(functools.partial(self.jitted, parameters), arrays)

    def mesh(self) -> AbstractContextManager[Any]:
        """Return the context of the mesh that was set when the function was made."""
        return within(self._mesh)

    def read_by_pullback(self, arrays: Sequence[Any]) -> list[Any]:
        """Return those of the function's arrays that its pullback takes.

        A linear function's reads none: TensorFlow then does not compute them for the pullback.
        """
        return list(itertools.compress(arrays, self._reads))

    @functools.cached_property
    def _reads(self) -> list[bool]:
        if self._outline is None:
            return [True] * len(self._inputs)
        parameters, cotangents = self._outline.parameters, self._outline.cotangents
        arrays = self._outline.arrays(cotangents)
        with self.mesh():
            traced = jax.make_jaxpr(self._gradients)(parameters, arrays, cotangents)
        first = len(jax.tree.leaves(parameters))
        return read_arguments(traced.jaxpr)[first : first + len(arrays)]

    def _pull_back(self, parameters: Parameters, *read_and_cotangents: Any) -> tuple:
        read = iter(read_and_cotangents[: sum(self._reads)])
        cotangents = read_and_cotangents[sum(self._reads) :]
        if self._outline is None:
            return self._gradients(parameters, list(read), cotangents)
        arrays = [
            next(read) if is_read else jnp.zeros(array.shape, array.dtype)
            for is_read, array in zip(self._reads, self._outline.arrays(cotangents), strict=True)
        ]
        return self._gradients(parameters, arrays, cotangents)

    def _gradients(
        self, parameters: Parameters, arrays: Sequence[Any], cotangents: Sequence[Any]
    ) -> tuple:
        places = [i for i, has_gradient in enumerate(self._inputs) if has_gradient]

        def differentiable(*values: Any) -> tuple:
            merged = list(arrays)
            for i, value in zip(places, values, strict=True):
                merged[i] = value
            outputs = self._function(parameters, *merged)
            return tuple(itertools.compress(outputs, self._outputs))

        _, vjp = jax.vjp(differentiable, *(arrays[i] for i in places))
        return jax.tree.map(jnp.conj, vjp(jax.tree.map(jnp.conj, tuple(cotangents))))


class Bridge:
    """One JAX function, with the parameters that it uses, callable on TensorFlow's tensors.

    In a graph the call is a stateless operation, which TensorFlow drops where only the gradient
    is asked for. TensorFlow keeps the Python functions of a graph, and the gradients that were
    registered for it, for ever: they get a weak reference to the bridge alone.

    Parameters
    ----------
    function
        The function to call.
    parameters
        Returns the parameters to call it with, anew at each call.
    """

    def __init__(self, function: JaxFunction, parameters: Callable[[], Parameters]) -> None:
        self._function = function
        self._parameters = parameters
        self._pullback: Bridge | None = None
        self._lock = threading.Lock()

    @property
    def pullback(self) -> Bridge:
        with self._lock:
            if self._pullback is None:
                self._pullback = Bridge(self._function.pullback, self._parameters)
            return self._pullback

    def read_by_pullback(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return those of the function's tensors that its pullback takes."""
        return self._function.read_by_pullback(tensors)

    # AutoGraph would convert the sources of JAX. The decorator leaves a __wrapped__ behind, by
    # which Xplique knows a watched layer: it stands here, and not at the layers' call.
    @tf.autograph.experimental.do_not_convert
    def __call__(self, tensors: Sequence[tf.Tensor], specs: Sequence[Spec]) -> list[tf.Tensor]:
        """Call the function; ``specs`` are the outputs' static shapes and dtypes."""
        return _differentiable(weakref.ref(self), list(tensors), list(specs))

    def execute(self, *arrays: np.ndarray) -> list[np.ndarray]:
        outputs = self._function(self._parameters(), *arrays)
        return [np.asarray(output) for output in outputs]

    def execute_on_gpu(self, *tensors: tf.Tensor) -> list[tf.Tensor]:
        parameters = self._parameters()
        devices = gpu.devices_of(parameters)
        arrays = [gpu.to_jax(tensor, devices) for tensor in tensors]
        outputs = self._function(parameters, *arrays)
        return [gpu.to_tensorflow(output) for output in outputs]


def _alive(reference: weakref.ref[Bridge]) -> Bridge:
    bridge = reference()
    if bridge is None:
        raise RuntimeError(
            "The FlaxWrapper that this TensorFlow graph was traced with was deleted. "
            "Keep a reference to it for as long as the graph is used."
        )
    return bridge


def _differentiable(
    reference: weakref.ref[Bridge], tensors: list[tf.Tensor], specs: list[Spec]
) -> list[tf.Tensor]:
    @tf.custom_gradient
    def operation(*inputs: tf.Tensor) -> tuple[list[tf.Tensor], Callable]:
        outputs = _run(reference, inputs, specs)

        def gradient(*upstream: tf.Tensor) -> list[tf.Tensor | None]:
            places = [i for i, tensor in enumerate(inputs) if _has_gradient(tensor.dtype)]
            cotangents = [
                g for g, (_, dtype) in zip(upstream, specs, strict=True) if _has_gradient(dtype)
            ]
            gradients: list[tf.Tensor | None] = [None] * len(inputs)
            if not places or not cotangents:
                return gradients
            bridge = _alive(reference)
            pulled = bridge.pullback(
                [*bridge.read_by_pullback(inputs), *cotangents],
                [(_static_shape(inputs[i]), inputs[i].dtype) for i in places],
            )
            for i, value in zip(places, pulled, strict=True):
                gradients[i] = value
            return gradients

        return outputs, gradient

    return operation(*tensors)


def _has_gradient(dtype: tf.DType) -> bool:
    return dtype.is_floating or dtype.is_complex


def _static_shape(tensor: tf.Tensor) -> list[int | None] | None:
    return None if tensor.shape.rank is None else tensor.shape.as_list()


def _run(
    reference: weakref.ref[Bridge], inputs: Sequence[tf.Tensor], specs: list[Spec]
) -> list[tf.Tensor]:
    def execute(*arrays: np.ndarray) -> list[np.ndarray]:
        return _alive(reference).execute(*arrays)

    def execute_on_gpu(*tensors: tf.Tensor) -> list[tf.Tensor]:
        return _alive(reference).execute_on_gpu(*tensors)

    dtypes = [dtype for _, dtype in specs]
    if tf.executing_eagerly():
        if gpu.is_shared():
            return execute_on_gpu(*inputs)
        arrays = execute(*(np.asarray(tensor) for tensor in inputs))
        return [tf.convert_to_tensor(array) for array in arrays]
    # TensorFlow does not drop a py_function, even where nothing but the gradient is needed.
    if gpu.is_shared() and not gpu.is_gradient_asked():
        outputs = tf.py_function(execute_on_gpu, inputs, dtypes)
    else:
        outputs = tf.numpy_function(execute, inputs, dtypes, stateful=False)
    # An operation, unlike set_shape, tells TensorFlow's graph optimiser the shapes too.
    return [
        output if shape is None else tf.ensure_shape(output, shape)
        for output, (shape, _) in zip(outputs, specs, strict=True)
    ]
