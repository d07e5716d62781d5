"""A Flax model as a Keras functional model."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import keras
import numpy as np
import tensorflow as tf

from .bridge import Bridge, JaxFunction
from .graph import UNUSED, Graph, ModelFunction
from .layers import (
    FlaxLayer,
    InputLayer,
    NoInside,
    OpaqueReLULayer,
    ReLU,
    SharedParameter,
    is_replaced,
    refuse_to_look_inside,
)
from .linen import LinenFunction, Output, checked_output
from .release import CacheEntry, release_all


class FlaxWrapper(keras.Model):
    r"""A Flax model as a Keras functional model, which all of Xplique can explain.

    Parameters
    ----------
    flax_module : flax.linen.Module
        The model. Its ``apply`` method is called with the parameters and the inputs.
    parameters : dict or FrozenDict
        What ``flax_module.init()`` returns: ``params``, and other collections that the model
        reads, such as ``batch_stats``. Flax models do not hold their parameters themselves.
    input_shape : tuple of int, optional
        The shape of one sample, without the batch, such as ``(28, 28, 1)``. With it the model
        has layers, which Grad-CAM, Grad-CAM++, FEM, Guided Backprop, DeconvNet,
        ModelRandomization and sub-models need. Other methods do without.
    apply_kwargs : dict, optional
        Keyword arguments of each call, such as ``{"train": False}``.
    method : str or function, optional
        The method of the module that is called, by default ``__call__``.
    rngs : dict, optional
        The random streams of a module that asks for some, such as
        ``{"dropout": jax.random.key(0)}``. They are the same ones at each call.
    output : str, int or function, optional
        Which array is explained where the module returns several: a key or an index of its
        output, or a function of it.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the accepted kind, or if they do not fit one another. What can
        be seen without inputs is raised here, and with ``input_shape`` everything is.

    Notes
    -----
    Inputs are an array or tensor of shape (N, \*input_shape), of any real dtype. They are
    computed on in float32, the outputs are float32, and a gradient has the dtype of the inputs.

    The model is called through one compiled JAX function per direction. The layers compute only
    for those who look inside: a layer whose ``call`` was replaced, a sub-model, a clone.

    Layers are named by their module's path, such as ``Block_0.Conv_1``. Each ReLU is a Keras
    ``ReLU`` layer.

    Examples
    --------
    >>> import flax.linen as nn
    >>> import jax
    >>> import numpy as np
    >>> from xplique.attributions import Saliency
    >>> from xplique_flax import FlaxWrapper
    >>> module = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3)])
    >>> inputs = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    >>> parameters = module.init(jax.random.key(0), inputs)
    >>> wrapped = FlaxWrapper(module, parameters)
    >>> Saliency(wrapped)(inputs, np.eye(3)[[0, 1, 2, 0, 1]]).shape
    TensorShape([5, 4])
    """

    def __init__(
        self,
        flax_module: Any,
        parameters: Any = None,
        *,
        input_shape: Sequence[int] | None = None,
        apply_kwargs: Mapping[str, Any] | None = None,
        method: str | Callable | None = None,
        rngs: Any = None,
        output: Output | None = None,
    ) -> None:
        shape = _checked_input_shape(input_shape)
        function = LinenFunction(flax_module, parameters, apply_kwargs, method, rngs, output)
        self._assemble(function, shape)
        if shape is not None:
            self._check_no_batch_dimension(function, shape)

    def _assemble(self, function: ModelFunction, shape: tuple | None) -> None:
        release_all(FlaxWrapper)
        graph = None
        if shape is not None:
            graph = Graph(function, shape)
        inputs, outputs, variables = _connect(function, graph, shape)
        super().__init__(inputs=inputs, outputs=outputs, name=function.name)
        entry = CacheEntry(self._inputs, self._outputs)
        self._replaceable = [layer for layer in self.layers if not _is_input(layer)]
        self._core = _Core(function, graph, variables, entry)

    def _check_no_batch_dimension(self, function: LinenFunction, shape: tuple[int, ...]) -> None:
        # Flax's convolutions fold an axis too many into the batch without a word.
        graph = self._core.graph
        folds = graph is not None and len(shape) in graph.convolution_ranks
        if shape[0] == 1 and folds and function.accepts(shape[1:]):
            raise ValueError(
                f"`input_shape` is {shape}, which begins with a batch dimension of 1: the model's "
                f"convolutions take inputs of {len(shape)} dimensions, with the batch. Accepted is "
                f"the shape of one sample, without it. Pass {shape[1:]}."
            )

    @tf.autograph.experimental.do_not_convert
    def __call__(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Return the outputs, of shape (N, ...) and dtype float32, for inputs of shape (N, ...)."""
        if keras.utils.is_keras_tensor(inputs):
            return super().__call__(inputs)
        if training:
            raise ValueError(
                "`training` is True, and the mode of a wrapped Flax model is fixed: accepted are "
                "False and None. Pass the flag of the module itself when you wrap it, for "
                'example `apply_kwargs={"train": True}`, if you mean to explain that mode.'
            )
        return self.call(inputs)

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> tf.Tensor:
        """Compute the outputs of tensors, as ``__call__`` does."""
        tensor = self._core.checked(inputs)
        self.release()
        if any(is_replaced(layer) for layer in self._replaceable):
            return super().call(tensor)
        return self._core(tensor)

    def compute_output_spec(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        """Return the output's symbolic tensor, for a model that is part of another one."""
        shape = tuple(inputs.shape)
        return keras.KerasTensor((shape[0], *self._core.output_shape(shape[1:])), dtype="float32")

    def truncate(self, layer: str | int) -> FlaxWrapper:
        """Return the model up to the output of a layer.

        It is what ``output_layer`` of Xplique's explainers would give, and as quick to call as
        the whole model: explain the logits of a model that ends in a softmax with it.

        Parameters
        ----------
        layer : str or int
            The name or index of the layer. Where a module is called several times, its first
            call counts, as for ``layer.output`` of Keras.

        Returns
        -------
        truncated : FlaxWrapper
            A model of its own, with the parameters that this one has now.

        Raises
        ------
        ValueError
            If there is no such layer, or if its output has no batch dimension.
        """
        target = self._layer(layer)
        graph = self._core.graph
        assert graph is not None and self._core.shape is not None
        if target.name not in {cell.layer for cell in graph.cells}:
            raise ValueError(
                f"`layer` is {layer!r}, which computes nothing. Accepted are layers after it."
            )
        truncated = FlaxWrapper.__new__(FlaxWrapper)
        truncated._assemble(_Truncated(self._core, graph, target.name), self._core.shape)
        return truncated

    def get_layer(self, name: str | None = None, index: int | None = None) -> Any:
        """Return a layer by its name or index, as Keras's ``get_layer``."""
        if (name is None) == (index is None):
            return super().get_layer(name, index)
        return self._layer(index if name is None else name)

    def _layer(self, layer: str | int | None) -> Any:
        layers = self.layers
        if isinstance(layer, int):
            if not -len(layers) <= layer < len(layers):
                raise ValueError(
                    f"`layer` is {layer}, and the model has {len(layers)} layers. Accepted are "
                    f"indices from {-len(layers)} to {len(layers) - 1}."
                )
            return layers[layer]
        names = [known.name for known in layers]
        if layer in names:
            return layers[names.index(layer)]
        raise ValueError(_no_such_layer(layer, names, self._core.hidden))

    @property
    def outputs(self) -> Any:
        """The symbolic outputs."""
        core = vars(self).get("_core")
        if core is not None:
            core.cache_entry.announce()
        return self._outputs

    def release(self) -> None:
        """Leave the cache in which Xplique would keep this model alive for ever.

        It is done at each call, and costs a later explainer nothing.
        """
        self._core.cache_entry.release()

    def get_weights(self) -> list[np.ndarray]:
        """Return the values of the parameters, layer by layer, in Keras's order."""
        self._require_inside()
        self.release()
        return super().get_weights()

    def set_weights(self, weights: Sequence[np.ndarray]) -> None:
        """Set the values of the parameters, in the order of :meth:`get_weights`."""
        self._require_inside()
        super().set_weights(weights)

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Print the layers, with their outputs' shapes and their numbers of parameters."""
        self._require_inside()
        super().summary(*args, **kwargs)

    def count_params(self) -> int:
        """Return the number of parameters."""
        self._require_inside()
        return super().count_params()

    @property
    def layers(self) -> list[Any]:
        """The layers, for a model that was made with ``input_shape``."""
        if "_core" in vars(self):  # else Keras is building the model
            self._require_inside()
        return super().layers

    def _require_inside(self) -> None:
        if self._core.graph is None:
            refuse_to_look_inside()


def _refused(what: str, where: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"FlaxWrapper.{what}() is not available: a wrapped model is made to be explained. "
            f"{where}"
        )

    refuse.__name__ = what
    refuse.__doc__ = f"Not available. {where}"
    return refuse


_TRAIN = "Train the Flax module itself, for example with Optax, and wrap it again."
_SAVE = (
    "Save the parameters of the Flax module, for example with Orbax or flax.serialization, and "
    "wrap them again after restoring."
)
_EXPORT = "Export the Flax module itself, for example with jax.export."
for _name, _where in {
    "fit": _TRAIN,
    "train_on_batch": _TRAIN,
    "train_step": _TRAIN,
    "save": _SAVE,
    "save_weights": _SAVE,
    "load_weights": _SAVE,
    "get_config": _SAVE,
    "to_json": _SAVE,
    "export": _EXPORT,
    "quantize": _EXPORT,
}.items():
    setattr(FlaxWrapper, _name, _refused(_name, _where))


class _Core:
    """The whole model as one function, and what is known of its inputs and outputs."""

    def __init__(
        self,
        function: ModelFunction,
        graph: Graph | None,
        variables: dict[int, Any],
        cache_entry: CacheEntry,
    ) -> None:
        self.function = function
        self.graph = graph
        self.shape = None if graph is None else graph.input_shape
        self.hidden = {} if graph is None else graph.hidden
        self.cache_entry = cache_entry
        self._variables = variables
        self._bridge = Bridge(JaxFunction(self._forward, [True], [True]), self._leaves_of_call)
        self._output_shapes = functools.lru_cache(maxsize=64)(self._output_shape)

    def leaves(self) -> list[Any]:
        variables = self._variables
        return [
            variables[i].array if i in variables else leaf
            for i, leaf in enumerate(self.function.leaves)
        ]

    def _leaves_of_call(self) -> list[Any]:
        self.cache_entry.release()
        return self.leaves()

    def _forward(self, leaves: Sequence[Any], inputs: Any) -> tuple:
        if inputs.shape[0] == 0:  # which many modules can't reshape
            return (jnp.zeros((0, *self.output_shape(inputs.shape[1:]))),)
        return (self.function(leaves, inputs),)

    def _output_shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self.function.leaves]
        output = jax.eval_shape(
            self.function, leaves, jax.ShapeDtypeStruct((2, *sample), jnp.float32)
        )
        return tuple(output.shape[1:])

    def output_shape(self, sample: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of one output; it raises what is wrong with the sample's shape."""
        return self._output_shapes(sample)

    def checked(self, inputs: Any) -> tf.Tensor:
        """Return the inputs as a float32 tensor of a shape that the model takes."""
        try:
            tensor = tf.convert_to_tensor(inputs)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`inputs` is of type {type(inputs).__name__}, which is no array. Accepted are "
                f"one NumPy array or tensor of real numbers, with the batch first. {error}"
            ) from None
        if not (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool):
            raise TypeError(
                f"`inputs` is an array of {tensor.dtype.name}. Accepted are real numbers: "
                "floating point, integer or bool."
            )
        rank = tensor.shape.rank
        if rank == 0:
            raise ValueError(
                "`inputs` has no dimension. Accepted is an array of shape (N, ...), with the "
                "batch first."
            )
        if self.shape is not None and rank is not None:
            if not tensor.shape[1:].is_compatible_with(self.shape) or rank != len(self.shape) + 1:
                raise ValueError(_wrong_shape(tensor.shape, self.shape))
        return tf.cast(tensor, tf.float32)

    def __call__(self, tensor: tf.Tensor) -> tf.Tensor:
        sample = self.shape
        if sample is None and tensor.shape[1:].is_fully_defined():
            sample = tuple(tensor.shape[1:])
        shape = None
        if sample is not None:
            shape = [tensor.shape[0], *self.output_shape(sample)]
        return self._bridge([tensor], [(shape, tf.float32)])[0]


class _Truncated:
    """A traced model up to one of its layers, as the function of a wrapper."""

    def __init__(self, core: _Core, graph: Graph, layer: str) -> None:
        self._graph = graph
        self._layer = layer
        self.leaves = core.leaves()
        self.leaf_names = core.function.leaf_names
        self.name = f"{core.function.name}_{layer}"

    def __call__(self, leaves: Sequence[Any], inputs: Any) -> Any:
        return checked_output(self._graph.prefix(self._layer, leaves, inputs), inputs)

    tagged = __call__


def _connect(
    function: ModelFunction, graph: Graph | None, shape: tuple | None
) -> tuple[Any, Any, dict[int, Any]]:
    """Make the layers, and connect them as the graph says."""
    if graph is None or shape is None:
        inputs = keras.Input(batch_shape=(None,), name="inputs")
        return inputs, NoInside(name="inside")(inputs), {}

    if any(cell.filters for cell in graph.cells):
        inputs = keras.Input(shape=shape, dtype="float32", name=graph.input_name)
    else:
        inputs = InputLayer(shape=shape, dtype="float32", name=graph.input_name).output
    names = function.leaf_names
    layers: dict[str, Any] = {}
    variables: dict[int, Any] = {}
    holders: dict[int, SharedParameter] = {}
    tensors: dict[tuple[int, int], Any] = {(-1, 0): inputs}
    calls: dict[str, int] = {}
    for index, cell in enumerate(graph.cells):
        arguments = [tensors[ref] for ref in cell.inputs]
        if cell.relu is not None:
            ceiling = None if np.isinf(cell.relu) else cell.relu
            outputs = ReLU(max_value=ceiling, name=cell.layer, dtype="float32")(arguments[0])
        else:
            if cell.layer not in layers:
                cells = [other for other in graph.cells if other.layer == cell.layer]
                own = dict.fromkeys(leaf for other in cells for leaf in other.leaves)
                kind = OpaqueReLULayer if any(c.hidden_relu for c in cells) else FlaxLayer
                layers[cell.layer] = kind(
                    graph,
                    cell.layer,
                    {leaf: function.leaves[leaf] for leaf in own},
                    {leaf: names[leaf] for leaf in own},
                )
                variables |= layers[cell.layer].variables_by_leaf
            for leaf in cell.shared:
                if leaf not in holders:
                    holders[leaf] = SharedParameter(
                        function.leaves[leaf], names[leaf], names[leaf].split(".", 1)[1]
                    )
                    variables |= {leaf: holders[leaf].flax_parameters[0]}
                arguments.append(holders[leaf](arguments[0]))
            node = calls.get(cell.layer, 0)
            calls[cell.layer] = node + 1
            single = arguments[0] if len(arguments) == 1 else arguments
            outputs = layers[cell.layer](single, node=node)
        for i, tensor in enumerate(tf.nest.flatten(outputs)):
            tensors[index, i] = tensor
    return inputs, tensors[graph.output], variables


def _is_input(layer: Any) -> bool:
    return isinstance(layer, keras.layers.InputLayer)


def _no_such_layer(name: Any, names: list[str], hidden: dict[str, str]) -> str:
    if name in hidden and hidden[name] == UNUSED:
        return (
            f"`layer` is {name!r}, a module whose output the explained output does not depend on. "
            f"Accepted are {names}."
        )
    if name in hidden:
        return (
            f"`layer` is {name!r}, a module inside a `{hidden[name]}`, where one layer stands for "
            f"many calls and has no single output. Accepted are {names}: take the layer that has "
            "the loop in it, or write the loop out, with one module per step."
        )
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"`layer` is {name!r}, and the model has no layer of this name.{meant} It has {names}."


def _wrong_shape(given: Any, shape: tuple[int, ...]) -> str:
    text = (
        f"`inputs` has the shape {tuple(given)}, and the wrapper was made for samples of "
        f"`input_shape`={shape}. Accepted are inputs of shape (N, {', '.join(map(str, shape))})."
    )
    sample = tuple(given)[1:]
    if len(sample) == len(shape) > 1 and (*sample[1:], sample[0]) == shape:
        return f"{text} They look channels first: np.moveaxis(inputs, 1, -1) makes them fit."
    if tuple(given) == shape:
        return f"{text} One sample is a batch of one: inputs[None]."
    return f"{text} Resize the inputs, or wrap the model again with another `input_shape`."


def _checked_input_shape(input_shape: Any) -> tuple[int, ...] | None:
    if input_shape is None:
        return None
    wanted = (
        "Accepted is the shape of one sample, without the batch dimension: a tuple of positive "
        "integers, such as (28, 28, 1) for images, (T, W) for time series, (W,) for tabular data, "
        "or None."
    )
    sizes = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
    if sizes and sizes[0] is None:
        raise ValueError(
            f"`input_shape` is {input_shape}, which begins with None, as a batch dimension does. "
            f"{wanted} Pass {sizes[1:]}."
        )
    if not sizes or not all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) and n > 0 for n in sizes
    ):
        raise ValueError(f"`input_shape` is {input_shape}. {wanted} inputs.shape[1:] gives it.")
    return tuple(int(n) for n in sizes)
