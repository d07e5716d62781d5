"""A model as a pure function of its parameters and inputs, and plain JAX functions as models."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checks import (
    check_devices,
    check_function,
    check_same_constants,
    check_same_parameters,
    checked_preprocess,
    is_array,
)
from .devices import Devices
from .outputs import Output, Select, checked_output


class WrappedFunction:
    """A model with everything but its parameters and inputs fixed.

    What applies the model is up to the subclasses.

    Parameters
    ----------
    name
        The model's name.
    parameters
        A pytree of arrays.
    output, preprocess
        The arguments of :class:`xplique_flax.FlaxWrapper`.

    Attributes
    ----------
    leaves : list of array
        The parameters, as a flat list.
    leaf_names : list of str
        Where each of them is in the pytree, such as ``params.Conv_0.kernel``.
    """

    argument = "flax_module"
    devices: Devices | None = None

    def __init__(
        self,
        name: str,
        parameters: Any,
        output: Output | None,
        preprocess: Callable | None,
    ) -> None:
        # TensorFlow admits few names for what becomes a scope of its graphs.
        self.name = re.sub(r"[^A-Za-z0-9.]", "_", name).lstrip("_") or "model"
        self._select = Select(output)
        self._preprocess = checked_preprocess(preprocess)
        paths, self._structure = jax.tree.flatten_with_path(parameters)
        # A training step that donates its arguments takes the originals' memory away.
        self.leaves = _copied([leaf for _, leaf in paths])
        self.leaf_names = [_name(path) for path, _ in paths]
        check_devices(self.leaves, self.leaf_names)

    def spread_over(self, devices: Devices) -> None:
        """Hold the parameters on each of several devices, over which batches are spread."""
        self.devices = devices
        self.leaves = [devices.replicated(leaf) for leaf in self.leaves]

    def apply(self, parameters: Any, inputs: Any) -> Any:
        """Return what the model returns, for its pytree of parameters."""
        raise NotImplementedError

    def tagging(self) -> Any:
        """Return a context in which the model's submodules tag their inputs and outputs."""
        raise NotImplementedError

    def __call__(self, leaves: Sequence[Any], inputs: Any) -> Any:
        """Return the explained output, in float32, for a batch of inputs."""
        prepared = self._prepared(inputs)
        try:
            result = self.apply(jax.tree.unflatten(self._structure, leaves), prepared)
        except Exception as error:
            raise ValueError(self._explain(error, inputs)) from error
        return checked_output(self._select(result), inputs)

    def tagged(self, leaves: Sequence[Any], inputs: Any) -> Any:
        """Do the same, with the inputs and outputs of the submodules tagged."""
        with self.tagging():
            return self(leaves, inputs)

    def with_parameters(self, parameters: Any) -> WrappedFunction:
        """Return the same function with other values of its parameters."""
        leaves, structure = jax.tree.flatten(self.arrays_of(parameters))
        check_same_parameters(leaves, structure, self.leaves, self._structure, self.leaf_names)
        other = copy.copy(self)
        other.leaves = _copied(leaves)
        if self.devices:
            other.spread_over(self.devices)
        check_devices(other.leaves, self.leaf_names)
        return other

    def arrays_of(self, parameters: Any) -> Any:
        """Return the pytree of arrays that the user's parameters consist of."""
        return parameters

    def _prepared(self, inputs: Any) -> Any:
        try:
            return self._preprocess(inputs)
        except Exception as error:
            raise ValueError(
                f"`preprocess` is a function that failed with {type(error).__name__}: {error}. "
                f"Accepted is a function of JAX that takes float32 inputs of shape "
                f"{tuple(inputs.shape)}, the batch first, to what the model takes."
            ) from error

    def accepts(self, sample: tuple[int, ...]) -> bool:
        """Return whether the model can be applied to samples of a shape."""

        def apply(leaves: Sequence[Any], inputs: Any) -> Any:
            return self.apply(jax.tree.unflatten(self._structure, leaves), self._prepared(inputs))

        inputs = jax.ShapeDtypeStruct((2, *sample), jnp.float32)
        try:
            jax.eval_shape(apply, self.leaves, inputs)
        except Exception:
            return False
        return True

    def _explain(self, error: Exception, inputs: Any) -> str:
        reason = f"{type(error).__name__}: {error}"
        return self.explain_framework(error, inputs, reason) or self._explain_shapes(
            f"`{self.argument}` can't be applied to `inputs` of shape {tuple(inputs.shape)}. "
            f"{reason}",
            error,
            inputs,
        )

    def explain_framework(self, error: Exception, inputs: Any, reason: str) -> str:
        """Return what an error of the framework means; nothing if it says so itself."""
        return ""

    def _explain_shapes(self, text: str, error: Exception, inputs: Any) -> str:
        sample = tuple(inputs.shape[1:])
        if isinstance(
            error, jax.errors.ConcretizationTypeError | jax.errors.TracerArrayConversionError
        ):
            text += (
                " The module is compiled: what it does can depend on the shapes of its inputs, "
                "not on their values. Use jnp.where or jax.lax.cond, and jnp in place of np."
            )
        if re.search("must (be|have) (an )?integer", str(error)):
            text += (
                " Inputs are computed on in float32, as Xplique gives them: a module that looks "
                "up integers has to cast them itself (`inputs.astype(int)`)."
            )
        if "ShardingType" in type(error).__name__:
            text += (
                " The parameters are sharded over a mesh with axes of the type Explicit, and the "
                "model does not say how its results are. Shard them over a mesh with axes of the "
                "type Auto, or gather them: jax.device_get(parameters)."
            )
        moved = (*sample[1:], sample[0]) if len(sample) > 1 else sample
        if moved != sample and self.accepts(moved):
            text += (
                f" They look channels first: samples of shape {moved} do fit. Flax and Xplique "
                "want channels last, (N, H, W, C): np.moveaxis(inputs, 1, -1)."
            )
        elif len(sample) > 1 and self.accepts(sample[1:]):
            text += (
                f" Samples of shape {sample[1:]} do fit: does the shape include the batch "
                "dimension? `input_shape` is the shape of one sample, without it."
            )
        return text


def _copied(leaves: Sequence[Any]) -> list[Any]:
    """Copy arrays onto the device, without compiling an operation for each shape."""
    return [
        # Where memory is aligned, JAX uses that of NumPy's arrays whatever `may_alias` is.
        jax.device_put(np.array(leaf))
        if isinstance(leaf, np.ndarray)
        else jax.device_put(leaf, may_alias=False)
        for leaf in leaves
    ]


def _name(path: tuple) -> str:
    """Return where an array is in a pytree, whether or not it is in a box of Flax's."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")


class PlainFunction(WrappedFunction):
    """A function of JAX, of inputs alone or of parameters and inputs.

    Parameters
    ----------
    function
        ``function(inputs)``, or ``function(parameters, inputs)`` where parameters are given.
    parameters
        Any pytree. What is no array in it, such as a function or a number, is constant.
    """

    argument = "function"

    def __init__(
        self,
        function: Callable,
        parameters: Any,
        output: Output | None,
        preprocess: Callable | None,
    ) -> None:
        check_function(function, parameters)
        self._function = function
        self._has_parameters = parameters is not None
        self._constants = _constants(parameters)
        name = getattr(function, "__name__", type(function).__name__)
        super().__init__(name, self.arrays_of(parameters), output, preprocess)
        self.leaf_names = [f"params.{name}" for name in self.leaf_names]

    def apply(self, parameters: Any, inputs: Any) -> Any:
        """Call the function, with its constants among the parameters."""
        if not self._has_parameters:
            return self._function(inputs)
        whole = jax.tree.map(
            lambda array, constant: constant if array is None else array,
            parameters,
            self._constants,
            is_leaf=lambda leaf: leaf is None,
        )
        return self._function(whole, inputs)

    def with_parameters(self, parameters: Any) -> WrappedFunction:
        """Return the same function with other arrays; what is no array has to be the same."""
        other = super().with_parameters(parameters)
        check_same_constants(_constants(parameters), self._constants)
        return other

    def arrays_of(self, parameters: Any) -> Any:
        """Return the parameters with None in the place of what is no array."""
        return jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, parameters)

    def tagging(self) -> Any:
        """Return a context that does nothing: the user's own names are tags."""
        return contextlib.nullcontext()


def _constants(parameters: Any) -> Any:
    """Return the parameters with None in the place of arrays."""
    return jax.tree.map(lambda leaf: None if is_array(leaf) else leaf, parameters)
