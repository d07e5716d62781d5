"""The Keras layers that a Flax model is made of."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf

from .bridge import Bridge, JaxFunction
from .checks import check_not_training, refuse_to_save
from .graph import Cell, Graph, Value
from .jaxprs import LONGEST_UNROLLED
from .parameters import Parameter, current_values


def is_replaced(layer: keras.layers.Layer) -> bool:
    """Return whether somebody put another function in the place of ``layer.call``.

    Xplique's ``end_watch_layer`` leaves the layer's own method behind as an attribute: that is
    no replacement.
    """
    call = vars(layer).get("call")
    return call is not None and getattr(call, "__func__", None) is not type(layer).call


def computes(layer: keras.layers.Layer, graph: Graph, cell: Cell) -> bool:
    """Return whether a layer computes what a cell of the graph does."""
    if cell.relu is None:
        return type(layer) in (FlaxLayer, OpaqueReLULayer) and layer.graph is graph
    ceiling = None if np.isinf(cell.relu) else cell.relu
    settings = {"max_value": ceiling, "negative_slope": 0, "threshold": 0}
    return type(layer) is ReLU and settings.items() <= layer.get_config().items()


def why_no_output(layer: keras.layers.Layer) -> str:
    """Return why a layer's output can't be explained; nothing if it can."""
    if isinstance(layer, SharedParameter):
        return "it holds a parameter that several layers use"
    return ""


class _Direct:
    """Call the layer without Keras's name scope, which admits few of the names modules have."""

    _trackable_children = save_own_variables = refuse_to_save

    @tf.autograph.experimental.do_not_convert
    def __call__(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        check_not_training(training)
        if any(keras.utils.is_keras_tensor(t) for t in tf.nest.flatten(inputs)):
            return super().__call__(inputs, **kwargs)  # type: ignore[misc]
        return self.call(inputs, **kwargs)  # type: ignore[attr-defined]


class ReLU(_Direct, keras.layers.ReLU):
    """A ReLU of the Flax model, which Xplique finds and replaces as any Keras one."""


class FlaxLayer(_Direct, keras.layers.Layer):
    """What the Flax model computes between two cuts, with the parameters used there.

    Parameters
    ----------
    graph
        The traced model.
    name
        The layer's name in the graph.
    parameters
        The values of the parameters that the layer owns, by their number in the graph.
    leaf_names
        The names of these.
    """

    supports_jit = False

    def __init__(
        self,
        graph: Graph,
        name: str,
        parameters: dict[int, Any],
        leaf_names: dict[int, str],
    ) -> None:
        super().__init__(name=name, dtype="float32")
        self.supports_jit = False
        self._inside = _Inside(graph, name, parameters, leaf_names)
        self.flax_parameters = self._inside.in_keras_order()
        filters = self._inside.cells[0].filters
        if filters is not None:
            self.filters = filters
        self.built = True

    @property
    def graph(self) -> Graph:
        """The graph that the layer was made for."""
        return self._inside.graph

    @property
    def variables_by_leaf(self) -> dict[int, Parameter]:
        """The layer's parameters, by their number in the graph."""
        return self._inside.variables

    @property
    def sources(self) -> dict[int, Any]:
        """The same, and the arrays that are no weights."""
        return self._inside.sources

    def compute_output_spec(self, inputs: Any, node: int = 0) -> Any:
        outputs = [
            keras.KerasTensor(value.shape(None), dtype=value.dtype)
            for value in self._inside.cells[node].outputs
        ]
        return outputs[0] if len(outputs) == 1 else outputs

    def call(self, inputs: Any, node: int = 0) -> Any:
        """Evaluate one node: the first tensors are the cell's inputs, then shared parameters."""
        tensors = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        outputs = self._inside.evaluate(node, tensors)
        return outputs[0] if len(outputs) == 1 else outputs

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, **self._inside.config()}


class OpaqueReLULayer(FlaxLayer):
    """A layer with a ReLU inside that can't be replaced, which says so to whoever tries."""

    @property
    def activation(self) -> Any:
        return tf.nn.relu

    @activation.setter
    def activation(self, _: Any) -> NoReturn:
        where = next(c.hidden_relu for c in self._inside.cells if c.hidden_relu)
        raise ValueError(
            f"The layer {self.name!r} has a ReLU inside a `{where}`, and Guided Backprop and "
            "DeconvNet have to replace every ReLU. They accept ReLUs outside of while, cond, "
            f"custom derivatives and scans of more than {LONGEST_UNROLLED} steps: write the loop "
            "out, with one module per step, or use another method, such as Saliency or Integrated "
            "Gradients."
        )


class SharedParameter(_Direct, keras.layers.Layer):
    """A parameter that several layers use, as a layer that returns its value."""

    def __init__(self, parameter: Any, leaf_name: str, name: str) -> None:
        super().__init__(name=name, dtype="float32")
        self._inside = _Holder(parameter, leaf_name)
        self.flax_parameters = [self._inside.variable]
        self.built = True

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        return keras.KerasTensor(self._inside.variable.shape, dtype="float32")

    def call(self, inputs: Any) -> tf.Tensor:
        return self._inside.bridge([tf.stop_gradient(inputs)], [self._inside.spec()])[0]

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "parameter": self._inside.variable.array,
            "leaf_name": self._inside.leaf_name,
        }


def refuse_to_look_inside() -> NoReturn:
    """Raise the error that says what to pass."""
    raise ValueError(
        "`input_shape` was not given to FlaxWrapper, and what looks inside the model needs it "
        "(Grad-CAM, Grad-CAM++, FEM, Guided Backprop, DeconvNet, ModelRandomization, layers, "
        "weights, sub-models). Pass the shape of one sample, without the batch, for example "
        "FlaxWrapper(flax_module, parameters, input_shape=inputs.shape[1:])."
    )


class NoInside(keras.layers.Layer):
    """Stands for the whole model where it was made without ``input_shape``."""

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        return keras.KerasTensor((None,), dtype="float32")

    def call(self, inputs: Any) -> NoReturn:
        refuse_to_look_inside()

    def get_config(self) -> NoReturn:
        refuse_to_look_inside()


class InputLayer(keras.layers.InputLayer):
    """The input of a model without a convolution, which says so to Grad-CAM's search for one."""

    @property
    def filters(self) -> NoReturn:
        raise ValueError(
            "The model has no convolution with the channels last, which Grad-CAM, Grad-CAM++ and "
            "FEM look for when no `conv_layer` is given. Pass the `conv_layer` to look at, by a "
            "name or index of `wrapped.layers` whose output is (N, H, W, C), or use a method for "
            "any model, such "
            "as Saliency or Integrated Gradients."
        )


class _Inside:
    """The JAX side of a layer, out of sight of Keras, which tracks a layer's attributes."""

    def __init__(
        self, graph: Graph, name: str, values: dict[int, Any], leaf_names: dict[int, str]
    ) -> None:
        self.graph = graph
        self.name = name
        self.leaf_names = leaf_names
        self.variables = {
            leaf: Parameter(value, leaf_names[leaf])
            for leaf, value in values.items()
            if graph.is_weight(leaf)
        }
        self.sources: dict[int, Any] = values | self.variables
        self.nodes = [i for i, cell in enumerate(graph.cells) if cell.layer == name]
        self.cells: list[Cell] = [graph.cells[i] for i in self.nodes]
        current = functools.partial(current_values, self.sources)
        self.bridges = [Bridge(self.graph.function_of(node), current) for node in self.nodes]

    def in_keras_order(self) -> list[Parameter]:
        """Kernel, bias; scale, bias, mean, variance: as they are used, statistics last."""
        return sorted(self.variables.values(), key=lambda variable: not variable.trainable)

    def evaluate(self, node: int, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        cell = self.cells[node]
        expected = len(cell.inputs) + len(cell.shared)
        if len(tensors) != expected:
            raise ValueError(
                f"The layer {self.name!r} was called with {len(tensors)} tensor(s), and it takes "
                f"{expected}: the layers of this model do not follow each other in a row, as "
                "HadamardProjection takes them to do. Cut the model with `wrapped.split(layer)`."
            )
        batch = cell.batch_size([tensor.shape for tensor in tensors])
        return self.bridges[node](tensors, [spec_of(value, batch) for value in cell.outputs])

    def config(self) -> dict[str, Any]:
        return {
            "graph": self.graph,
            "parameters": current_values(self.sources),
            "leaf_names": self.leaf_names,
        }


class _Holder:
    """The JAX side of a shared parameter."""

    def __init__(self, value: Any, leaf_name: str) -> None:
        self.leaf_name = leaf_name
        self.variable = Parameter(value, leaf_name)
        function = JaxFunction(
            lambda parameters, _: (parameters[0].astype(np.float32),), [True], [True]
        )
        self.bridge = Bridge(function, lambda: [self.variable.array])

    def spec(self) -> tuple[list[int | None], tf.DType]:
        return list(self.variable.shape), tf.float32


def spec_of(value: Value, batch: int | None) -> tuple[list[int | None], tf.DType]:
    """Return the static shape of a value at a batch size, and its dtype."""
    return list(value.shape(batch)), tf.as_dtype(value.dtype)
