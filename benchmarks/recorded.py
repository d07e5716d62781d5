"""The batches that an explanation computes, and the same ones in JAX alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import tensorflow as tf

from xplique_flax.bridge import Bridge


class Batch(NamedTuple):
    """One call of the wrapped model: of its gradient, if there are cotangents."""

    arrays: Sequence[np.ndarray]
    seconds: float


def timed(call: Callable[[], Any]) -> float:
    """Return how many seconds a call takes."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def recorded(call: Callable[[], Any], execute: Callable = Bridge.execute) -> list[Batch]:
    """Explain once, and return the model calls that were needed, in order.

    ``execute(bridge, *arrays)`` computes each of them.
    """
    batches: list[Batch] = []

    def noted(bridge: Bridge, *arrays: np.ndarray) -> list[np.ndarray]:
        start = time.perf_counter()
        outputs = execute(bridge, *arrays)
        seconds = time.perf_counter() - start
        batches.append(Batch([array.copy() for array in arrays], seconds))
        return outputs

    with mock.patch.object(Bridge, "execute", noted):
        call()
    return batches


def in_a_row(model: tf.keras.Model | None, batches: Sequence[Batch]) -> Callable[[], Any]:
    """Return what computes batches one after the other in one graph of TensorFlow, or nothing."""
    tensors = [[tf.constant(array) for array in batch.arrays] for batch in batches]

    @tf.function
    def run(batches: list[list[tf.Tensor]]) -> list[tf.Tensor]:
        results: list[tf.Tensor] = []
        for inputs, *cotangents in batches:
            with tf.control_dependencies(results[-1:]):
                x = tf.identity(inputs)
            if model is None:
                results.append(x)
            elif cotangents:
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    outputs = model(x)
                results.append(tape.gradient(outputs, x, cotangents[0]))
            else:
                results.append(model(x))
        return results

    return lambda: run(tensors)


class PureJax:
    """A module's forward pass and gradient, as a user of JAX alone would compile them."""

    def __init__(self, module: Any, variables: Any) -> None:
        self._variables = variables
        self._forward = jax.jit(module.apply)

        def gradient(variables: Any, inputs: Any, cotangents: Any) -> Any:
            _, pullback = jax.vjp(lambda x: module.apply(variables, x), inputs)
            return pullback(cotangents)[0]

        self._gradient = jax.jit(gradient)

    def execute(self, _: Any, *arrays: np.ndarray) -> list[np.ndarray]:
        """Compute a batch, and bring the result to the host."""
        function = self._forward if len(arrays) == 1 else self._gradient
        return [np.asarray(function(self._variables, *arrays))]

    def run(self, batches: Sequence[Batch]) -> None:
        """Compute batches one after the other."""
        for batch in batches:
            self.execute(None, *batch.arrays)
