"""Calls of oneDNN, which XLA has built in on x86 processors, and convolutions by it."""

from __future__ import annotations

import functools
import json
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax import lax
from jaxlib import version

from .windows import windows_along

# XLA ends the process over a call that it cannot read, and how to write one is not documented.
# With these versions it was tried.
_VERSIONS = ("0.10.0", "0.10.1", "0.10.2")
# oneDNN brings the kernel into an order of its own in each call.
_FEWEST_PLACES = 64
# In one and two dimensions, XLA's own convolutions of one group are faster with less than that.
_MANY_PLACES = 2**11
_MANY_MULTIPLICATIONS = 2**24
# In one dimension oneDNN gains less: with many places of few channels, or with very many places.
_FEW_CHANNELS = 16
_VERY_MANY_PLACES = 2**14
# With windows of a single place, XLA computes a product, whose result has two axes. What follows,
# such as a sum, has four, and XLA then writes it beside that result and not in its place.
_EXPANDED = 4  # times the channels
_LARGE = 2**20


def convolution(
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
    """Compute a convolution in float32 with the channels last where oneDNN is faster than XLA.

    It takes three quarters to nine tenths of the time, a third for the few channels of an image,
    and a thirtieth for depthwise convolutions. Where windows do not overlap, it gains no
    time. Where there are many more channels than before, it gains memory: what ResNet-50 computes
    takes 0.7 to 0.75 of it.
    """
    outputs, inwards, *window = dimension_numbers.rhs_spec
    if len(window) not in (1, 2, 3) or min(map(min, padding)) < 0 or not is_usable():
        return NotImplemented
    sizes = [kernel.shape[axis] for axis in window]
    padded = [size + sum(around) for size, around in zip(inputs.shape[1:-1], padding, strict=True)]
    # JAX would tell the shape as well, in 1 ms.
    spans = zip(padded, sizes, window_strides, rhs_dilation, strict=True)
    found = [max(0, windows_along(*span)) for span in spans]
    shape = (len(inputs), *found, kernel.shape[outputs])
    result = jax.ShapeDtypeStruct(shape, inputs.dtype)
    is_empty = 0 in (*inputs.shape, *kernel.shape, *result.shape)
    places = math.prod(result.shape[:-1])
    channels = inputs.shape[-1], result.shape[-1]
    if any(size > stride for size, stride in zip(sizes, window_strides, strict=True)):
        is_taken = _is_large(len(window), places, channels, kernel.size, feature_group_count)
    else:
        is_product = sizes == [*window_strides] == [1, 1] and feature_group_count == 1
        is_expanded = channels[1] >= _EXPANDED * channels[0]
        is_taken = is_product and is_expanded and result.size >= _LARGE
    if is_empty or not is_taken:
        return NotImplemented
    config = _configuration(inputs.ndim, window_strides, padding, rhs_dilation, feature_group_count)
    kernel = kernel.transpose(*window, inwards, outputs)
    return call("__onednn$convolution", {"onednn_conv_config": config}, result, inputs, kernel)


def _is_large(
    rank: int, places: int, channels: tuple[int, int], kernel_size: int, groups: int
) -> bool:
    """Return whether oneDNN gains more than a call of it costs."""
    if groups > 1 or rank == 3:
        return places >= _FEWEST_PLACES
    if rank == 1:
        has_few = min(channels) <= _FEW_CHANNELS
        return places >= (_MANY_PLACES if has_few else _VERY_MANY_PLACES)
    is_heavy = places * kernel_size >= _MANY_MULTIPLICATIONS
    return places >= (_FEWEST_PLACES if is_heavy else _MANY_PLACES)


def call(function: str, config: dict[str, Any], result: Any, *operands: Any) -> Any:
    """Call a function of oneDNN by the name that XLA has for it, with XLA's configuration of it."""
    made = jax.ffi.ffi_call(
        function,
        jax.ShapeDtypeStruct(result.shape, result.dtype),
        custom_call_api_version=1,
        legacy_backend_config=json.dumps(config),
    )
    return made(*operands)


def _configuration(
    rank: int,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> dict[str, Any]:
    """Return what XLA's `onednn_config.proto` holds for a convolution with the channels last."""
    places = {"batch_dim": 0, "feature_dim": rank - 1, "spatial_dims": list(range(1, rank - 1))}
    return {
        "dims": rank,
        "input": {"data": places},
        "kernel": {
            "filter": {
                "input_feature_dim": rank - 2,
                "output_feature_dim": rank - 1,
                "spatial_dims": list(range(rank - 2)),
            }
        },
        "output": {"data": places},
        "window": {
            "pad_left": [low for low, _ in padding],
            "pad_right": [high for _, high in padding],
            "strides": strides,
            "window_dilations": dilation,
        },
        "feature_groups": groups,
    }


def is_usable() -> bool:
    """Return whether XLA can be asked for oneDNN here.

    What uses it cannot be put into JAX's compilation cache, nor be spread over devices.
    """
    config: Any = jax.config
    return (
        version.__version__ in _VERSIONS
        and (sys.platform, platform.machine()) == ("linux", "x86_64")
        and jax.local_device_count() == 1
        and not (config.jax_enable_compilation_cache and config.jax_compilation_cache_dir)
    )


@functools.cache
def has_wide_vectors() -> bool:
    """Return whether Linux says that the processor has AVX-512."""
    described = Path("/proc/cpuinfo")
    return described.exists() and "avx512f" in described.read_text("utf-8")
