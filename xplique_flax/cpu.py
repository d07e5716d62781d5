"""What XLA computes slowly on a CPU, asked for in another way."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import onednn
from .jaxprs import flipped_kernels, substitute

# XLA runs what it fuses for this library on one core at some batch sizes, such as 16, 32 and 64.
_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
_LARGEST_WINDOW = 32


class Compiled:
    """What `jax.jit` makes of a function, with what is slow on a CPU replaced there.

    Parameters
    ----------
    function
        ``function(parameters, *arrays)``.
    """

    def __init__(self, function: Callable) -> None:
        self._traced = jax.jit(function)
        self._is_replaced = jax.default_backend() == "cpu"
        self._jitted: Any = (
            jax.jit(self._run, compiler_options=_known_options())
            if self._is_replaced
            else self._traced
        )
        self._flips: dict[tuple, list[tuple[int, tuple[int, ...]]]] = {}

    def __call__(self, parameters: Any, *arrays: Any) -> Any:
        """Call the compiled function."""
        if not self._is_replaced:
            return self._jitted(parameters, *arrays)
        shapes = tuple(array.shape for array in arrays)
        if shapes not in self._flips:
            self._flips[shapes] = self._compile(parameters, *arrays)
        flips = self._flips[shapes]
        leaves = jax.tree.leaves(parameters) if flips else ()
        kernels = [_flipped(leaves[number], axes) for number, axes in flips]
        return self._jitted(kernels, parameters, *arrays)

    def _compile(self, parameters: Any, *arrays: Any) -> list[tuple[int, tuple[int, ...]]]:
        """Compile ahead of the first call, and return the kernels that it reads backwards.

        What compiling needs, the reversed kernels and the memory of the call are not there at once.
        """
        flips = list(self._trace(parameters, *arrays)[1].values())
        leaves = jax.tree.leaves(parameters)
        kernels = [_outline(leaves[number], axes) for number, axes in flips]
        self._jitted.lower(kernels, parameters, *arrays).compile()
        _release_memory()
        return flips

    @property
    def compilations(self) -> int:
        """How often the function was compiled."""
        return self._jitted._cache_size()

    def _trace(self, parameters: Any, *arrays: Any) -> tuple[Any, dict[Any, Any]]:
        traced = self._traced.trace(parameters, *arrays)
        return traced, flipped_kernels(traced.jaxpr.jaxpr, len(jax.tree.leaves(parameters)))

    def _run(self, kernels: Sequence[Any], *arguments: Any) -> Any:
        traced, flips = self._trace(*arguments)
        known = {
            variable: _swapped(kernel, axes)
            for kernel, (variable, (_, axes)) in zip(kernels, flips.items(), strict=True)
        }
        results = substitute(traced.jaxpr, _SUBSTITUTES, jax.tree.leaves(arguments), known)
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), results)


# XLA reverses the kernels of convolutions, and swaps their channels, in each call that computes a
# gradient, slowly. They are kept here instead, for as long as the kernels live.
_kept: dict[tuple[int, tuple[int, ...]], tuple[weakref.ref, Any]] = {}


def _flipped(kernel: Any, axes: tuple[int, ...]) -> Any:
    key = id(kernel), axes
    if key not in _kept:
        # By NumPy, because JAX would compile the operation for each shape, in 40 ms.
        flipped = np.ascontiguousarray(_swapped(np.flip(np.asarray(kernel), axes), axes))
        flipped = jax.device_put(flipped, _place(kernel))
        _kept[key] = weakref.ref(kernel, lambda _: _kept.pop(key, None)), flipped
    return _kept[key][1]


def _outline(kernel: Any, axes: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Return what is known of a reversed kernel before there is one."""
    shape = _swapped(np.broadcast_to(0, kernel.shape), axes).shape
    return jax.ShapeDtypeStruct(shape, kernel.dtype, sharding=_place(kernel))


def _place(kernel: Any) -> Any:
    """Return where a reversed kernel is put; nothing if that is left to JAX."""
    return kernel.sharding if kernel.committed and kernel.is_fully_replicated else None


def _swapped(kernel: Any, axes: tuple[int, ...]) -> Any:
    """Swap the two axes that are not reversed, those of the channels."""
    return kernel.swapaxes(*(axis for axis in range(kernel.ndim) if axis not in axes))


def _release_memory() -> None:
    """Give back what a compilation needed, which the C library would keep beside what is used."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU C library alone has it
        if trim:
            trim(0)


@functools.cache
def _known_options() -> dict[str, Any]:
    """Return the options, if this version of XLA knows them."""
    try:
        jax.jit(lambda: 0, compiler_options=_OPTIONS).lower().compile()
    except Exception:
        return {}
    return _OPTIONS


def max_pool(
    inputs: Any,
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **dilations: Sequence[int],
) -> Any:
    """Compute ``reduce_window_max`` as one operation on whole arrays for each place in the window.

    XLA joins them with what comes before, which it does not do with its own loop over the windows.
    """
    is_dilated = any(size > 1 for sizes in dilations.values() for size in sizes)
    is_floating = jnp.issubdtype(inputs.dtype, jnp.floating)
    if is_dilated or not is_floating or math.prod(window_dimensions) > _LARGEST_WINDOW:
        return NotImplemented
    padded = _padded(inputs, padding)
    spans = zip(padded.shape, window_dimensions, window_strides, strict=True)
    shape = [(size - window) // stride + 1 for size, window, stride in spans]
    values = [
        _values_at(padded, place, shape, window_strides) for place in _places(window_dimensions)
    ]
    return functools.reduce(jnp.maximum, values)


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
    if math.prod(window_dimensions) > _LARGEST_WINDOW:
        return NotImplemented
    padded = _padded(inputs, padding)
    places = _places(window_dimensions)
    values = [_values_at(padded, place, gradient.shape, window_strides) for place in places]
    largest, where = values[0], jnp.zeros(gradient.shape, "int32")
    for index, value in enumerate(values[1:], 1):
        is_larger = ~(largest >= value)
        largest = jnp.where(is_larger, value, largest)
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


def _padded(inputs: Any, padding: Sequence[tuple[int, int]]) -> Any:
    lowest = jnp.array(-jnp.inf, inputs.dtype)
    return lax.pad(inputs, lowest, [(low, high, 0) for low, high in padding])


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


_SUBSTITUTES: dict[str, Callable] = {
    "conv_general_dilated": onednn.convolution,
    "reduce_window_max": max_pool,
    "select_and_scatter_add": max_pool_gradient,
}
