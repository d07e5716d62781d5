"""What a window slides over, as operations on whole arrays, one for each place in the window."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .materialized import materialized

_LARGEST_WINDOW = 32
_LARGEST_DEPTHWISE_WINDOW = 64  # ConvNeXt's are 7 x 7
# Joined with pooling of so many channels, activations with exponential functions are computed a
# number at a time, in two to four times the time.
_SLOWLY_JOINED = range(5, 16)


def max_pool(inputs: Any, **window: Any) -> Any:
    """Compute ``reduce_window_max`` as one operation on whole arrays for each place in the window.

    XLA joins them with what comes before, which it does not do with its own loop over the windows.
    """
    is_floating = jnp.issubdtype(inputs.dtype, jnp.floating)
    return _pool(jnp.maximum, -jnp.inf, inputs, **window) if is_floating else NotImplemented


def sum_pool(
    inputs: Any,
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> Any:
    """Compute ``reduce_window_sum``, of average pooling and its gradient, in the same way.

    Average pooling takes 0.14 to 0.8 of the time. Its gradient is a sum over windows of numbers
    with zeros between them, which are repeated where the windows of the pooling do not overlap:
    that of a small convolutional network takes 0.76 to 0.97 of the time, and 0.41 to 0.47 where
    windows overlap.
    """
    if inputs.dtype != np.float32:  # XLA adds numbers of half the precision in another one
        return NotImplemented
    axes = list(zip(inputs.shape, padding, base_dilation, window_dimensions, strict=True))
    is_repeated = max(*window_strides, *window_dilation) == 1 and all(
        low == k - 1 and (step == k or n == 1) for n, (low, _), step, k in axes
    )
    if is_repeated:
        for axis, times in enumerate(window_dimensions):
            inputs = jnp.repeat(inputs, times, axis)
        return with_padding(inputs, [(0, high + 1 - k) for _, (_, high), _, k in axes], 0)
    if max(base_dilation) > 1:
        zeros = [(*around, step - 1) for around, step in zip(padding, base_dilation, strict=True)]
        inputs = lax.pad(inputs, np.zeros((), inputs.dtype), zeros)
        padding = ((0, 0),) * inputs.ndim
    return _pool(
        jnp.add,
        0,
        inputs,
        window_dimensions=window_dimensions,
        window_strides=window_strides,
        padding=padding,
        window_dilation=window_dilation,
    )


def _pool(
    combine: Callable[[Any, Any], Any],
    padder: float,
    inputs: Any,
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **dilations: Sequence[int],
) -> Any:
    is_dilated = any(size > 1 for sizes in dilations.values() for size in sizes)
    if is_dilated or math.prod(window_dimensions) > _LARGEST_WINDOW:
        return NotImplemented
    if inputs.shape[-1] in _SLOWLY_JOINED:
        inputs = materialized(inputs)
    padded = with_padding(inputs, padding, padder)
    spans = zip(padded.shape, window_dimensions, window_strides, strict=True)
    shape = [windows_along(*span) for span in spans]
    values = [
        _values_at(padded, place, shape, window_strides) for place in _places(window_dimensions)
    ]
    return functools.reduce(combine, values)


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
    operation on whole arrays for each place in the window, with the same result. The maxima are
    found before: where windows of 3 x 3 overlap, it takes a quarter to a sixth of the time.
    """
    is_max = select_prim.name == "ge"  # minima are selected by another comparison
    if not is_max or math.prod(window_dimensions) > _LARGEST_WINDOW or not gradient.size:
        return NotImplemented
    places = _places(window_dimensions)
    padded = with_padding(inputs, padding, -jnp.inf)
    largest: Any = -jnp.inf
    where = jnp.zeros(gradient.shape, "int8")
    for index, place in enumerate(places):
        value = _values_at(padded, place, gradient.shape, window_strides)
        is_larger = ~(largest >= value)
        largest = jnp.where(is_larger, value, largest)
        where = jnp.where(is_larger, np.int8(index), where)
    where = materialized(where)  # or XLA would find it anew for each number that is read of it
    parts = {place: jnp.where(where == index, gradient, 0) for index, place in enumerate(places)}
    sizes = [low + size + high for (low, high), size in zip(padding, inputs.shape, strict=True)]
    for axis in reversed(range(gradient.ndim)):
        fronts = dict.fromkeys(place[:axis] for place in parts)
        parts = {
            front: _spread(
                [parts[*front, i] for i in range(window_dimensions[axis])],
                axis,
                window_strides[axis],
                sizes[axis],
            )
            for front in fronts
        }
    ends = [low + size for (low, _), size in zip(padding, inputs.shape, strict=True)]
    return lax.slice(parts[()], [low for low, _ in padding], ends)


def depthwise_convolution(
    inputs: Any,
    kernel: Any,
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    **_: Any,
) -> Any:
    """Compute a convolution with the channels last where each channel is convolved by itself.

    It takes a fortieth to a seventh of the time of XLA's own convolution.
    """
    outputs, inwards, *axes = dimension_numbers.rhs_spec
    taps = kernel.transpose(*axes, inwards, outputs)
    *window, per_group, channels = taps.shape
    is_depthwise = (per_group, channels) == (1, feature_group_count)
    if not is_depthwise or math.prod(window) > _LARGEST_DEPTHWISE_WINDOW:
        return NotImplemented
    padded = with_padding(inputs, [(0, 0), *padding, (0, 0)], 0)
    spans = zip(padded.shape[1:-1], window, window_strides, rhs_dilation, strict=True)
    sizes = [windows_along(*span) for span in spans]
    if min(sizes, default=0) < 1:
        return NotImplemented
    values = (
        _values_at(
            padded,
            (0, *(i * step for i, step in zip(place, rhs_dilation, strict=True)), 0),
            (len(inputs), *sizes, channels),
            (1, *window_strides, 1),
        )
        * jnp.expand_dims(taps[place], range(inputs.ndim - 2))
        for place in _places(window)
    )
    return functools.reduce(jnp.add, values)


def windows_along(size: int, window: int, stride: int, dilation: int = 1) -> int:
    """Return how many windows there are along an axis with its padding; less than one for none."""
    return (size - (window - 1) * dilation - 1) // stride + 1


def with_padding(inputs: Any, padding: Sequence[tuple[int, int]], value: float) -> Any:
    """Put a value around an array, or take away what is there where the padding is negative."""
    padder = jnp.array(value, inputs.dtype)
    return lax.pad(inputs, padder, [(low, high, 0) for low, high in padding])


def _places(window: Sequence[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, window)))


def _values_at(
    padded: Any, place: Sequence[int], shape: Sequence[int], strides: Sequence[int]
) -> Any:
    """Return what stands at one place of each window."""
    spans = zip(place, shape, strides, strict=True)
    limits = [start + (size - 1) * stride + 1 for start, size, stride in spans]
    return lax.slice(padded, place, limits, strides)


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
