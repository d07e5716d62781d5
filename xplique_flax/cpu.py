"""What XLA computes slowly on a CPU, asked for in another way."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .jaxprs import substitute

# XLA runs what it fuses for this library on one core at some batch sizes, such as 16, 32 and 64.
_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def compiled(function: Callable) -> Callable:
    """Return what `jax.jit` makes of a function, with what is slow on a CPU replaced there."""
    if jax.default_backend() != "cpu":
        return jax.jit(function)

    @functools.wraps(function)
    def quicker(*arguments: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = substitute(closed, _SUBSTITUTES, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return jax.jit(quicker, compiler_options=_known_options())


@functools.cache
def _known_options() -> dict[str, Any]:
    """Return the options, if this version of XLA knows them."""
    try:
        jax.jit(lambda: 0, compiler_options=_OPTIONS).lower().compile()
    except Exception:
        return {}
    return _OPTIONS


def max_pool_gradient(
    gradient: Any,
    inputs: Any,
    *,
    select_prim: Any,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Any:
    """Compute ``select_and_scatter_add``: each gradient goes to the first maximum of its window.

    XLA has a loop over the windows for it, on one core and a number at a time. Here it is one
    operation on whole arrays for each place in the window, with the same result.
    """
    lowest = jnp.array(-jnp.inf, inputs.dtype)
    padded = lax.pad(inputs, lowest, [(low, high, 0) for low, high in padding])

    def values_at(place: Sequence[int]) -> Any:
        spans = zip(place, gradient.shape, window_strides, strict=True)
        limits = [start + (size - 1) * stride + 1 for start, size, stride in spans]
        return lax.slice(padded, place, limits, window_strides)

    places = list(itertools.product(*map(range, window_dimensions)))
    largest, where = values_at(places[0]), jnp.zeros(gradient.shape, "int32")
    for index, place in enumerate(places[1:], 1):
        values = values_at(place)
        is_larger = ~(largest >= values)
        largest = jnp.where(is_larger, values, largest)
        where = jnp.where(is_larger, index, where)

    parts = {place: jnp.where(where == index, gradient, 0) for index, place in enumerate(places)}
    for axis in reversed(range(gradient.ndim)):
        fronts = dict.fromkeys(place[:axis] for place in parts)
        parts = {
            front: _spread(
                [parts[*front, i] for i in range(window_dimensions[axis])],
                axis,
                window_strides[axis],
                padded.shape[axis],
            )
            for front in fronts
        }
    ends = [low + size for (low, _), size in zip(padding, inputs.shape, strict=True)]
    return lax.slice(parts[()], [low for low, _ in padding], ends)


def _spread(parts: Sequence[Any], axis: int, stride: int, size: int) -> Any:
    """Add up arrays of which the i-th belongs to every `stride`-th place from the i-th on."""
    count = -(-size // stride)
    shape = list(parts[0].shape)
    shape[axis] = count
    phases = []
    for first in range(stride):
        total = jnp.zeros(shape, parts[0].dtype)
        for shift, part in enumerate(parts[first::stride]):
            padding = [(0, 0, 0)] * part.ndim
            padding[axis] = (shift, count - part.shape[axis] - shift, 0)
            total += lax.pad(part, jnp.zeros((), part.dtype), padding)
        phases.append(total)
    shape[axis] = count * stride
    whole = jnp.stack(phases, axis + 1).reshape(shape)
    return lax.slice_in_dim(whole, 0, size, axis=axis)


_SUBSTITUTES = {"select_and_scatter_add": max_pool_gradient}
