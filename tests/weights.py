"""The weights of Flax models for their Keras twins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorflow as tf

K = tf.keras
L = K.layers


def _arrays(layer: K.layers.Layer, variables: Mapping[str, Any]) -> list[np.ndarray]:
    """The arrays of the Flax module that a Keras layer is named after, in Keras's order."""
    params = variables["params"]
    stats = variables.get("batch_stats", {})
    for name in layer.name.split("."):
        if name.isdigit() and name not in params:  # of a stack of parameters
            params, stats = jax.tree.map(lambda stack: stack[int(name)], (params, stats))  # noqa: B023
        else:
            params, stats = params[name], stats.get(name, {})
    if isinstance(layer, L.MultiHeadAttention):
        return [
            params[part][kind]
            for part in ("query", "key", "value", "out")
            for kind in ("kernel", "bias")
        ]
    if isinstance(layer, L.LSTM):
        kernels = [
            np.concatenate([params[source + gate]["kernel"] for gate in "ifgo"], axis=-1)
            for source in "ih"
        ]
        return [*kernels, np.concatenate([params["h" + gate]["bias"] for gate in "ifgo"])]
    if isinstance(layer, L.Conv2DTranspose):
        # Flax correlates by default where Keras convolves.
        return [params["kernel"][::-1, ::-1].transpose(0, 1, 3, 2), params["bias"]]
    if not isinstance(params, Mapping):
        return [params]
    order = ("kernel", "scale", "embedding", "bias")
    return [params[kind] for kind in order if kind in params] + [
        stats[kind] for kind in ("mean", "var") if kind in stats
    ]


def copy_weights(variables: Mapping[str, Any], twin: K.Model) -> None:
    """Give a Keras model the weights of the Flax model that it is the twin of."""
    for layer in twin.layers:
        if layer.weights:
            arrays = _arrays(layer, variables)
            layer.set_weights(
                [
                    np.reshape(array, weight.shape)
                    for array, weight in zip(arrays, layer.weights, strict=True)
                ]
            )
    total = sum(np.size(leaf) for leaf in jax.tree_util.tree_leaves(variables))
    assert twin.count_params() == total, "a parameter of the Flax model has no place in the twin"
