"""ReLUs that XLA computes once, and what gradients keep of them, as bits."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

# For fewer numbers, the code takes longer to compile than it gains.
_FEWEST_KEPT = 2**17


def maximum(first: Any, second: Any, **_: Any) -> Any:
    """Compute ``max`` with zero so that XLA computes it once.

    XLA takes what reads one array for cheap enough to compute it anew for whatever reads it, and
    with it the sums before it: each block of a residual network would add up all the blocks before
    it again. A maximum of two arrays it does not compute anew, and that one of them is a ReLU of
    the other it does not see. ResNet-50 takes a tenth less time, and two fifths less memory.
    Choosing by a comparison does the same, but LLVM takes up to half a second to compile it for
    few channels.
    """
    if _is_zero(first):
        first, second = second, first
    dtype = jnp.result_type(first)
    if not _is_zero(second) or not jnp.issubdtype(dtype, jnp.floating):
        return NotImplemented
    zero, largest = np.array([0, jnp.finfo(dtype).max], dtype)
    return lax.max(first, lax.clamp(zero, first, largest))


def _is_zero(value: Any) -> bool:
    return isinstance(value, np.generic | np.ndarray | float) and np.ndim(value) == 0 and value == 0


def kept(mask: Any) -> Any:
    """Return a mask that is needed later, as it comes back from bits.

    XLA would keep the numbers that were compared until then, which need 32 times the memory. The
    gradient of ResNet-50 takes a tenth less time, and a third of the memory.
    """
    if mask.ndim < 2 or math.prod(mask.shape) < _FEWEST_KEPT:
        return mask
    # Bits of eight rows, and not of eight neighbours: the processor computes many of a row at once.
    number, rows, *rest = mask.shape
    padded = jnp.pad(mask, [(0, 0), (0, -rows % 8), *((0, 0) for _ in rest)])
    groups = padded.reshape(number, -1, 8, *rest)
    places = 1 << lax.broadcasted_iota("uint8", groups.shape, 2)
    bits = jnp.sum(groups.astype("uint8") * places, axis=2, dtype="uint8")
    return (bits[:, :, None] & places != 0).reshape(padded.shape)[:, :rows]
