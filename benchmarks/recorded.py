"""The batches that an explanation computes, and the same ones in JAX alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

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


def recorded(call: Callable[[], Any]) -> list[Batch]:
    """Explain once, and return the model calls that were needed, in order."""
    batches: list[Batch] = []
    execute = Bridge.execute

    def noted(bridge: Bridge, *arrays: np.ndarray) -> list[np.ndarray]:
        start = time.perf_counter()
        outputs = execute(bridge, *arrays)
        seconds = time.perf_counter() - start
        batches.append(Batch([array.copy() for array in arrays], seconds))
        return outputs

    with mock.patch.object(Bridge, "execute", noted):
        call()
    return batches


class PureJax:
    """A module's forward pass and gradient, as a user of JAX alone would compile them."""

    def __init__(self, module: Any, variables: Any) -> None:
        self._variables = variables
        self._forward = jax.jit(module.apply)

        def gradient(variables: Any, inputs: Any, cotangents: Any) -> Any:
            _, pullback = jax.vjp(lambda x: module.apply(variables, x), inputs)
            return pullback(cotangents)[0]

        self._gradient = jax.jit(gradient)

    def run(self, batches: Sequence[Batch]) -> None:
        """Compute the batches, and bring each result to the host."""
        for batch in batches:
            function = self._forward if len(batch.arrays) == 1 else self._gradient
            np.asarray(function(self._variables, *batch.arrays))
