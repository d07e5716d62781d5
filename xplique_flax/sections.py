"""A Keras model of a graph's layers, with all that lies between the watched ones fused."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from .bridge import Bridge, JaxFunction
from .checks import check_not_training, checked_inputs
from .graph import Graph
from .layers import FlaxLayer, ReLU, SharedParameter, computes, is_replaced, spec_of
from .parameters import current_values
from .policies import Gradient, gradient_of
from .trace import MODEL_INPUT, Ref


class LayeredModel(keras.Model):
    """The layers of a graph, of which those that nobody watches are computed together.

    It is made as any functional model of Keras is. ``clone_model`` makes one of a wrapper, for
    Guided Backprop, DeconvNet and ModelRandomization.
    """

    # AutoGraph looks for it at what is called, and would else convert the wrapper that
    # `do_not_convert` is, in 30 ms.
    autograph_info__ = None

    def __init__(self, inputs: Any, outputs: Any, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(inputs=inputs, outputs=outputs, name=name, **kwargs)
        self._watchable = [
            layer for layer in self.layers if not isinstance(layer, keras.layers.InputLayer)
        ]
        graphs = [layer.graph for layer in self._watchable if isinstance(layer, FlaxLayer)]
        is_as_traced = bool(graphs) and _is_as_traced(self, graphs[0])
        self._sections = Sections(graphs[0], self._watchable) if is_as_traced else None

    @tf.autograph.experimental.do_not_convert
    def __call__(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Return the outputs, of shape (N, ...) and dtype float32, for inputs of shape (N, ...)."""
        if self._sections is None or keras.utils.is_keras_tensor(inputs):
            return super().__call__(inputs, training=training, **kwargs)
        check_not_training(training)
        return self.call(inputs)

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> tf.Tensor:
        """Compute the outputs of tensors, as ``__call__`` does."""
        watched = self._watched()
        if self._sections is None or any(isinstance(one, SharedParameter) for one in watched):
            return super().call(inputs, training=training, mask=mask)
        tensor = checked_inputs(inputs, self._sections.graph.input_shape)
        return self._sections(tensor, watched)

    def _watched(self) -> list[keras.layers.Layer]:
        return [layer for layer in self._watchable if is_replaced(layer)]


class Sections:
    """What lies between layers that are watched, as one call of JAX each.

    Parameters
    ----------
    graph
        The traced model.
    layers
        Its Keras layers.
    """

    def __init__(self, graph: Graph, layers: Sequence[keras.layers.Layer]) -> None:
        self.graph = graph
        self._layers = {layer.name: layer for layer in layers}
        self._bridges: dict[JaxFunction, Bridge] = {}

    def __call__(self, inputs: tf.Tensor, watched: Sequence[keras.layers.Layer] = ()) -> tf.Tensor:
        """Return the outputs of the model, with some layers called by themselves.

        ReLUs to which Xplique gave another gradient are computed with what is around them.
        """
        values: dict[Ref, tf.Tensor] = {MODEL_INPUT: inputs}
        relus = {layer.name: gradient_of(layer) for layer in watched if isinstance(layer, ReLU)}
        nodes = {layer.name: 0 for layer in watched if relus.get(layer.name) is None}
        start = 0
        gradients: list[tuple[int, Gradient]] = []
        for index, cell in enumerate(self.graph.cells):
            if gradient := relus.get(cell.layer):
                gradients.append((index, gradient))
            elif cell.layer in nodes:
                self._run(start, index, gradients, values)
                self._call(index, nodes[cell.layer], values)
                nodes[cell.layer] += 1
                start = index + 1
                gradients = []
        self._run(start, len(self.graph.cells), gradients, values)
        return values[self.graph.output]

    def _run(
        self,
        start: int,
        stop: int,
        gradients: Sequence[tuple[int, Gradient]],
        values: dict[Ref, tf.Tensor],
    ) -> None:
        section = self.graph.section(start, stop, tuple(gradients))
        if not section.outputs:
            return
        if section.function not in self._bridges:
            current = functools.partial(current_values, self._sources(start, stop))
            self._bridges[section.function] = Bridge(section.function, current)
        batch = values[MODEL_INPUT].shape[0]
        outputs = self._bridges[section.function](
            [values[ref] for ref in section.inputs],
            [spec_of(self.graph.value(ref), batch) for ref in section.outputs],
        )
        values.update(zip(section.outputs, outputs, strict=True))

    def _sources(self, start: int, stop: int) -> dict[int, Any]:
        """Return what some cells' parameters are read from, by their numbers in the graph."""
        sources: dict[int, Any] = {}
        for cell in self.graph.cells[start:stop]:
            if cell.relu is None:
                sources |= self._layers[cell.layer].sources
            for leaf in cell.shared:
                holder = self._layers[self.graph.shared_names[leaf]]
                sources[leaf] = holder.flax_parameters[0]
        return sources

    def _call(self, index: int, node: int, values: dict[Ref, tf.Tensor]) -> None:
        cell = self.graph.cells[index]
        layer = self._layers[cell.layer]
        tensors = [values[ref] for ref in cell.inputs]
        if cell.relu is not None:
            outputs = layer(tensors[0])
        else:
            names = [self.graph.shared_names[leaf] for leaf in cell.shared]
            tensors += [self._layers[name](tensors[0]) for name in names]
            outputs = layer(tensors[0] if len(tensors) == 1 else tensors, node=node)
        values |= {(index, i): tensor for i, tensor in enumerate(tf.nest.flatten(outputs))}


def _is_as_traced(model: keras.Model, graph: Graph) -> bool:
    """Return whether a model is what was traced: who clones it may put other layers into it."""
    nodes = [node for level in model._nodes_by_depth.values() for node in level]
    # A shared parameter's value is the same wherever it is asked for.
    names: dict[int, Any] = {
        id(node.outputs[0]): node.operation.name
        for node in nodes
        if isinstance(node.operation, SharedParameter)
    }
    calls = {
        (
            node.operation.name,
            node.arguments.kwargs.get("node"),
            *(names.get(id(tensor), id(tensor)) for tensor in node.input_tensors),
        ): node
        for node in nodes
        if not node.is_input and not isinstance(node.operation, SharedParameter)
    }
    values: dict[Ref, int] = {MODEL_INPUT: id(model.inputs[0])}
    counts: dict[str, int] = {}
    for index, cell in enumerate(graph.cells):
        number = counts.get(cell.layer, 0)
        counts[cell.layer] = number + 1
        arguments: list[Any] = [values[ref] for ref in cell.inputs]
        arguments += [graph.shared_names[leaf] for leaf in cell.shared]
        call = (cell.layer, None if cell.relu is not None else number, *arguments)
        node = calls.get(call)
        if node is None or not computes(node.operation, graph, cell):
            return False
        values |= {(index, i): id(tensor) for i, tensor in enumerate(node.outputs)}
    return id(model.outputs[0]) == values[graph.output]
