"""What XLA computes slowly on a CPU, asked for in another way."""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from . import materialized, onednn, products, relus, transposed, windows
from .jaxprs import (
    flipped_kernels,
    has_groups_of_channels,
    has_products_in_loops,
    largest_array,
    most_rows_multiplied,
    share_of_transcendentals,
    substitute,
)
from .recomputed import recomputed

# XLA runs what it fuses for this library on one core at some batch sizes, such as 16, 32 and 64.
# Products in loops it computes faster: the gradient of an LSTM takes 0.13 to 0.9 of the time.
# Perceptrons mostly take 0.8 to 1.1 of the time with it.
_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
_PRODUCTS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
# With AVX-512, perceptrons with at least so many rows mostly take 1 to 1.1 of the time, up to 1.2.
_MANY_ROWS = 2**7
# While XLA compiles, this way to generate code takes about 1 MB for each group of operations: for
# the gradient of ResNet-50 it needs 130 MB in all, and 40 MB with the older way, whose code is as
# fast, but for exponentials and the like: networks with them take 1.1 to 2.5 times as long, those
# with depthwise convolutions 1.1 to 1.2 times, and recurrent ones up to 1.5 times.
_EMITTERS = "xla_cpu_use_fusion_emitters"
_FEW_TRANSCENDENTALS = 0.01  # of all numbers that are computed, such as a softmax at the end
# XLA asks for all of its memory in one piece at each call, and the C library has the system map
# and clear more than 32 MiB anew each time. Of smaller pieces, it keeps two. The gradient of
# EfficientNet takes three quarters of the time.
_HEAPS = "xla_multiheap_size_constraint_per_heap"
_HEAP = 30 * 2**20
_KEPT = 31 * 2**20
_PADDING = -2  # M_TOP_PAD in the library's malloc.h
# XLA warns of arrays that do not fit. It may need larger ones than those of the function.
_LARGER = 1.25
_MOST = 2**31 - 1  # more than this XLA does not take
_unknown: set[str] = set()  # the options that this version of XLA was found not to know


class _Program(NamedTuple):
    """A compiled function, and the kernels that it reads backwards: their numbers, and the axes."""

    jitted: Any
    flips: Sequence[tuple[int, tuple[int, ...]]]


class Compiled:
    """What `jax.jit` makes of a function, with what is slow on a CPU replaced there.

    Parameters
    ----------
    function
        ``function(parameters, *arrays)``.
    cotangents
        How many of the last arrays are cotangents, if the function is a pullback.
    """

    def __init__(self, function: Callable, cotangents: int = 0) -> None:
        self._traced = jax.jit(function)
        self._cotangents = cotangents
        self._is_replaced = jax.default_backend() == "cpu"
        self._programs: dict[tuple, _Program] = {}
        self._jitted: dict[tuple, Any] = {}

    def __call__(self, parameters: Any, *arrays: Any) -> Any:
        """Call the compiled function."""
        if not self._is_replaced:
            return self._traced(parameters, *arrays)
        shapes = tuple(array.shape for array in arrays)
        if shapes not in self._programs:
            self._programs[shapes] = self._compile(parameters, *arrays)
        program = self._programs[shapes]
        leaves = jax.tree.leaves(parameters) if program.flips else ()
        kernels = [_flipped(leaves[number], axes) for number, axes in program.flips]
        return program.jitted(kernels, parameters, *arrays)

    def _compile(self, parameters: Any, *arrays: Any) -> _Program:
        """Compile ahead of the first call.

        What compiling needs, the reversed kernels and the memory of the call are not there at once.
        """
        traced, found = self._trace(parameters, *arrays)
        flips = list(found.values())
        leaves = jax.tree.leaves(parameters)
        kernels = [_outline(leaves[number], axes) for number, axes in flips]
        options = _options(traced.jaxpr.jaxpr, is_gradient=self._cotangents > 0)
        jitted = self._compiled_with(options, kernels, parameters, *arrays)
        _release_memory()
        _keep_memory()
        return _Program(jitted, flips)

    def _compiled_with(self, options: dict[str, Any], *arguments: Any) -> Any:
        """Compile with those options that this version of XLA knows; it says which it does not."""
        known = {name: value for name, value in options.items() if name not in _unknown}
        jitted = self._jitted.setdefault(
            tuple(known.items()), jax.jit(self._run, compiler_options=known)
        )
        try:
            jitted.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            unknown = {name for name in known if f"'{name}'" in str(error)}
            if not unknown:
                raise
            _unknown.update(unknown)
            return self._compiled_with(options, *arguments)
        return jitted

    @property
    def compilations(self) -> int:
        """How often the function was compiled."""
        jitted: list[Any] = [*self._jitted.values()] if self._is_replaced else [self._traced]
        return sum(function._cache_size() for function in jitted)

    def _trace(self, parameters: Any, *arrays: Any) -> tuple[Any, dict[Any, Any]]:
        traced = self._traced.trace(parameters, *arrays)
        count = len(jax.tree.leaves(parameters))
        return traced, flipped_kernels(traced.jaxpr.jaxpr, count, _is_product)

    def _run(self, kernels: Sequence[Any], *arguments: Any) -> Any:
        traced, flips = self._trace(*arguments)
        known = {
            variable: _swapped(kernel, axes)
            for kernel, (variable, (_, axes)) in zip(kernels, flips.items(), strict=True)
        }
        arrays = jax.tree.leaves(arguments)
        again = recomputed(traced.jaxpr.jaxpr, self._cotangents)
        results = substitute(traced.jaxpr, _SUBSTITUTES, arrays, known, relus.kept, again)
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
    if library := _gnu_c_library():
        library.malloc_trim(0)


@functools.cache
def _keep_memory() -> None:
    """Have the C library keep what is freed from now on, and not give it back.

    The GNU C library keeps twice the size of the largest array that was ever freed, if that is
    less than 32 MiB. This array takes no memory: nothing is written to it.

    XLA's threads have heaps of 64 MiB. One that had to be added for a piece is given back when the
    piece is freed, unless the piece is smaller than the padding of heaps. It depends on what else
    is in a process; methods that perturb then take 1.15 to 1.3 times as long.
    """
    np.empty(_KEPT, "uint8")
    if library := _gnu_c_library():
        library.mallopt(_PADDING, _KEPT)


def _gnu_c_library() -> Any:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


def _options(jaxpr: Any, is_gradient: bool) -> dict[str, Any]:
    """Return the options of XLA for a function."""
    heap = max(_HEAP, math.ceil(_LARGER * largest_array(jaxpr)))
    has_loops = has_products_in_loops(jaxpr)
    rows = most_rows_multiplied(jaxpr)
    is_fused = has_loops or (rows > 0 and (rows < _MANY_ROWS or not onednn.has_wide_vectors()))
    options: dict[str, Any] = {_FUSIONS: _PRODUCTS if is_fused else ""}
    if heap <= _MOST:
        options[_HEAPS] = heap
    has_few = share_of_transcendentals(jaxpr) < _FEW_TRANSCENDENTALS
    if is_gradient and has_few and not has_loops and not has_groups_of_channels(jaxpr):
        options[_EMITTERS] = False
    return options


def convolution(inputs: Any, kernel: Any, **params: Any) -> Any:
    """Compute ``conv_general_dilated`` in the first way that is quicker than XLA's.

    With groups of channels, zeros between the inputs are written out for the quicker ways, which
    take none.
    """
    if not _is_plain(inputs, kernel, **params):
        return NotImplemented
    ways: tuple[Callable, ...] = (onednn.convolution, windows.depthwise_convolution)
    if max(params["lhs_dilation"], default=1) > 1:
        if params["feature_group_count"] == 1:
            ways = (transposed.convolution,)
        else:
            inputs, params = _without_dilation(inputs, params)
    for compute in (products.convolution, *ways):
        result = compute(inputs, kernel, **params)
        if result is not NotImplemented:
            return result
    return NotImplemented


def _is_product(inputs: Any, kernel: Any, **params: Any) -> bool:
    return _is_plain(inputs, kernel, **params) and products.is_product(inputs, kernel, **params)


def _is_plain(
    inputs: Any,
    kernel: Any,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    batch_group_count: int,
    preferred_element_type: Any = None,
    **_: Any,
) -> bool:
    """Return whether inputs and outputs are in float32, with the channels last."""
    channels_last = (0, inputs.ndim - 1, *range(1, inputs.ndim - 1))
    return (
        dimension_numbers.lhs_spec == dimension_numbers.out_spec == channels_last
        and inputs.dtype == kernel.dtype == np.float32 == (preferred_element_type or np.float32)
        and batch_group_count == 1
    )


def _without_dilation(inputs: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Write out the zeros around and between the inputs of a convolution."""
    places = params["dimension_numbers"].lhs_spec[2:]
    zeros = [(0, 0, 0)] * inputs.ndim
    for axis, (low, high), step in zip(
        places, params["padding"], params["lhs_dilation"], strict=True
    ):
        zeros[axis] = low, high, step - 1
    inputs = lax.pad(inputs, np.zeros((), inputs.dtype), zeros)
    return inputs, params | {
        "padding": ((0, 0),) * len(places),
        "lhs_dilation": (1,) * len(places),
    }


_SUBSTITUTES: dict[str, Callable] = {
    "conv_general_dilated": convolution,
    "dot_general": products.dot_general,
    "max": relus.maximum,
    "name": lambda value, **_: value,
    "reduce_window_max": windows.max_pool,
    "reduce_window_sum": windows.sum_pool,
    "reshape": materialized.reshape,
    "select_and_scatter_add": windows.max_pool_gradient,
}
