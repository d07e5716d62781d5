"""A model with some of its layers called by themselves, and all that lies between them fused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from .bridge import Bridge
from .graph import Graph
from .layers import spec_of
from .trace import MODEL_INPUT, Ref


class Sections:
    """What lies between layers that are watched, as one call of JAX each.

    Parameters
    ----------
    graph
        The traced model.
    layers
        Its Keras layers.
    leaves
        Returns the current parameters.
    """

    def __init__(
        self,
        graph: Graph,
        layers: Sequence[keras.layers.Layer],
        leaves: Callable[[], list[Any]],
    ) -> None:
        self._graph = graph
        self._layers = {layer.name: layer for layer in layers}
        self._leaves = leaves
        self._bridges: dict[tuple[int, int], Bridge] = {}

    def __call__(self, inputs: tf.Tensor, watched: Collection[str]) -> tf.Tensor:
        """Return the outputs of the model, with the layers of some names called by themselves."""
        values: dict[Ref, tf.Tensor] = {MODEL_INPUT: inputs}
        nodes = dict.fromkeys(watched, 0)
        start = 0
        for index, cell in enumerate(self._graph.cells):
            if cell.layer in watched:
                self._run(start, index, values)
                self._call(index, nodes[cell.layer], values)
                nodes[cell.layer] += 1
                start = index + 1
        self._run(start, len(self._graph.cells), values)
        return values[self._graph.output]

    def _run(self, start: int, stop: int, values: dict[Ref, tf.Tensor]) -> None:
        section = self._graph.section(start, stop)
        if not section.outputs:
            return
        if (start, stop) not in self._bridges:
            self._bridges[start, stop] = Bridge(section.function, self._leaves)
        batch = values[MODEL_INPUT].shape[0]
        outputs = self._bridges[start, stop](
            [values[ref] for ref in section.inputs],
            [spec_of(self._graph.value(ref), batch) for ref in section.outputs],
        )
        values.update(zip(section.outputs, outputs, strict=True))

    def _call(self, index: int, node: int, values: dict[Ref, tf.Tensor]) -> None:
        cell = self._graph.cells[index]
        layer = self._layers[cell.layer]
        tensors = [values[ref] for ref in cell.inputs]
        if cell.relu is not None:
            outputs = layer(tensors[0])
        else:
            names = [self._graph.shared_names[leaf] for leaf in cell.shared]
            tensors += [self._layers[name](tensors[0]) for name in names]
            outputs = layer(tensors[0] if len(tensors) == 1 else tensors, node=node)
        values |= {(index, i): tensor for i, tensor in enumerate(tf.nest.flatten(outputs))}
