"""Products with large matrices by oneDNN: dense layers, and convolutions of single places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from . import onednn

# With fewer numbers in the matrix, XLA is as fast.
_FEWEST_NUMBERS = 2**17
_FEWEST_ROWS = 16
# Without AVX-512, oneDNN takes up to 1.6 times as long as XLA for 32 to 256 rows.
_FEWEST_ROWS_IN_NARROW_VECTORS = 2**9
# With fewer columns, or rows of the matrix, XLA is up to 13 times as fast.
_NARROWEST = 4
# XLA brings a matrix that it reads transposed, as gradients do, into another order in each call.
_FEWEST_NUMBERS_TRANSPOSED = 2**16
_FEWEST_ROWS_TRANSPOSED = 2


def dot_general(
    left: Any,
    right: Any,
    *,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    **_: Any,
) -> Any:
    """Compute a product of rows with one large matrix.

    A gradient takes 0.04 to 0.9 of the time of XLA, an output 0.55 to 1.
    """
    (axes, others), batched = dimension_numbers
    number = len(axes)
    first, last = left.ndim - number, right.ndim - number
    is_transposed = tuple(others) == tuple(range(last, right.ndim))
    if (
        any(batched)
        or not axes
        or isinstance(precision, lax.DotAlgorithm | lax.DotAlgorithmPreset)
        or tuple(axes) != tuple(range(first, left.ndim))
        or not (is_transposed or tuple(others) == tuple(range(number)))
        or not left.dtype == right.dtype == np.float32 == (preferred_element_type or np.float32)
    ):
        return NotImplemented
    places = left.shape[:first]
    kept = right.shape[:last] if is_transposed else right.shape[number:]
    sizes = math.prod(right.shape[axis] for axis in others), math.prod(kept)
    if not _is_faster(math.prod(places), sizes, is_transposed):
        return NotImplemented
    rows = left.reshape(-1, sizes[0])
    matrix = right.reshape(sizes[::-1] if is_transposed else sizes)
    return _product(rows, matrix, is_transposed).reshape(*places, *kept)


def is_product(
    inputs: Any,
    kernel: Any,
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    **_: Any,
) -> bool:
    """Return whether `convolution` computes one that has the channels last."""
    outputs, inwards, *window = dimension_numbers.rhs_spec
    is_strided = max(window_strides, default=1) > 1
    strided = zip(inputs.shape[1:-1], window_strides, strict=True)
    return (
        all(kernel.shape[axis] == 1 for axis in window)
        and feature_group_count == 1
        and not (is_strided and (max(lhs_dilation) > 1 or np.any(padding)))
        and _is_faster(
            inputs.shape[0] * math.prod(math.ceil(size / step) for size, step in strided),
            (kernel.shape[inwards], kernel.shape[outputs]),
            outputs < inwards,
        )
    )


def convolution(inputs: Any, kernel: Any, **params: Any) -> Any:
    """Compute a convolution whose windows are single places, as a product with its kernel.

    A kernel that is read transposed, as in a gradient, does not have to be kept in that order.
    """
    if not is_product(inputs, kernel, **params):
        return NotImplemented
    outputs, inwards, *_ = params["dimension_numbers"].rhs_spec
    inputs = inputs[:, *(slice(None, None, step) for step in params["window_strides"])]
    matrix = kernel.reshape([kernel.shape[axis] for axis in sorted((inwards, outputs))])
    result = _product(inputs.reshape(-1, inputs.shape[-1]), matrix, outputs < inwards)
    zeros = [
        (*around, step - 1)
        for around, step in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    result = result.reshape(*inputs.shape[:-1], -1)
    return lax.pad(result, np.zeros((), result.dtype), [(0, 0, 0), *zeros, (0, 0, 0)])


def _is_faster(rows: int, sizes: tuple[int, int], is_transposed: bool) -> bool:
    """Return whether oneDNN is faster than XLA for a matrix, where it can be asked for."""
    if min(sizes) < _NARROWEST or not onednn.is_usable():
        return False
    numbers = math.prod(sizes)
    if is_transposed:
        return rows >= _FEWEST_ROWS_TRANSPOSED and numbers >= _FEWEST_NUMBERS_TRANSPOSED
    is_wide = onednn.has_wide_vectors()
    fewest = _FEWEST_ROWS if is_wide else _FEWEST_ROWS_IN_NARROW_VECTORS
    return rows >= fewest and numbers >= _FEWEST_NUMBERS


def _product(rows: Any, matrix: Any, is_transposed: bool) -> Any:
    columns = matrix.shape[0 if is_transposed else 1]
    result = jax.ShapeDtypeStruct((len(rows), columns), rows.dtype)
    config = {"onednn_matmul_config": {"transpose_b": is_transposed}}
    return onednn.call("__onednn$matmul", config, result, rows, matrix)
