"""Making the Keras layers of a graph, and connecting them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .dense import is_small
from .graph import Graph, ModelFunction
from .layers import FlaxLayer, InputLayer, NoInside, OpaqueReLULayer, ReLU, SharedParameter
from .parameters import Parameter


def connect(
    function: ModelFunction, graph: Graph | None, shape: tuple | None
) -> tuple[Any, Any, dict[int, Any]]:
    """Make the layers, and connect them as the graph says.

    Returns
    -------
    inputs, outputs
        The symbolic tensors of the model.
    variables
        The Keras variables of the parameters that layers own, or that a model without layers reads
        in graphs of TensorFlow, by their number.
    """
    if graph is None or shape is None:
        inputs = keras.Input(batch_shape=(None,), name="inputs")
        return inputs, NoInside(name="inside")(inputs), _variables(function)

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
                        function.leaves[leaf], names[leaf], graph.shared_names[leaf]
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


def _variables(function: ModelFunction) -> dict[int, Any]:
    if not is_small(function.leaves):
        return {}
    named = enumerate(zip(function.leaves, function.leaf_names, strict=True))
    return {
        i: Parameter(leaf, name)
        for i, (leaf, name) in named
        if leaf.dtype == np.float32 and leaf.is_fully_addressable
    }
