"""The sizes in which batches are computed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .devices import Devices
from .samples import Cost

Shape = tuple[int, ...]

# Bytes that may be alive at once. More samples at once are quicker, for as long as the C library
# keeps the memory from one call to the next, and the processor what was written last. It does so
# for each thread. With 20 and not 30 MB for outputs, a piece of ResNet-50 has two images and not
# four, and RISE takes 1 to 2 % longer.
_IN_FORWARD_PASS = 20e6
_IN_GRADIENT = 50e6
_FEWEST = 2
# How many samples a piece costs more than those that are in it.
_PIECE = 0.5
# About what it costs to compile one operation. Padding may waste as much for each size.
_COMPILATION = 1e7


class Batches:
    """The batch sizes that a function is compiled for, and those that batches are run in.

    A batch that is smaller than one that the function was compiled for is padded to its size, for
    as long as that costs less than to compile the function again. A batch that needs much memory is
    run in equal pieces. If samples depend on each other, each batch is run as it is.

    Parameters
    ----------
    cost_per_sample
        Returns for the shape of a sample, and whether it is for the pullback, what each costs, or
        ``None`` if the samples depend on each other.
    devices
        Devices to spread batches over, where samples do not depend on each other.
    of_pullback
        Whether the function is a pullback, which keeps most of what the forward pass computes.
    """

    def __init__(
        self,
        cost_per_sample: Callable[[Shape, bool], Cost | None],
        devices: Devices | None = None,
        of_pullback: bool = False,
    ) -> None:
        self._cost_per_sample = cost_per_sample
        self._devices = devices
        self._count = devices.count if devices else 1
        self._is_split = jax.default_backend() == "cpu"
        self._of_pullback = of_pullback
        self._compiled: dict[tuple[Shape, ...], set[int]] = {}
        self._wasted: dict[tuple[tuple[Shape, ...], int], float] = {}

    def of_pullback(self) -> Batches:
        """Return the same for the function's gradient."""
        return Batches(self._cost_per_sample, self._devices, of_pullback=True)

    def run(self, function: Callable[..., tuple], arrays: Sequence[Any]) -> Sequence[Any]:
        """Call the function with arrays whose first axis is the batch."""
        number = len(arrays[0])
        key = tuple(array.shape[1:] for array in arrays)
        if self._devices and number and self._cost(key[0], number) is not None:
            function = _spreading(function, self._devices)
        pieces, size = self._pieces(key, number)
        missing = pieces * size - number
        padded = [_padded(array, missing) for array in arrays] if missing else arrays
        if pieces == 1:
            results: Sequence[Any] = function(*padded)
        else:
            parts = [
                [np.asarray(result) for result in function(*(a[i : i + size] for a in padded))]
                for i in range(0, len(padded[0]), size)
            ]
            results = [np.concatenate(part) for part in zip(*parts, strict=True)]
        return [np.asarray(result)[:number] for result in results] if missing else results

    def _pieces(self, key: tuple[Shape, ...], number: int) -> tuple[int, int]:
        """Return into how many pieces of which size to split a batch."""
        compiled = self._compiled.setdefault(key, set())
        if number in compiled:
            return 1, number
        is_alone = number == 1 and not compiled and not self._devices
        cost = self._cost(key[0], number) if number and not is_alone else None
        if cost is None:
            compiled.add(number)
            return 1, number
        most = self._at_once(cost) * self._count
        fewest = math.ceil(number / most)
        sizes = [
            math.ceil(number / pieces / self._count) * self._count
            for pieces in range(fewest, 2 * fewest + 1)
        ]
        wanted = min(sizes, key=lambda size: math.ceil(number / size) * (size + _PIECE))
        size = self._size(compiled, key, wanted, cost)
        return math.ceil(number / size), size

    def _cost(self, sample: Shape, number: int) -> Cost | None:
        """Return what each sample costs; in the pullback where a batch may need too much for it.

        It has to be traced for that. A gradient needs less than all that the forward pass writes.
        """
        cost = self._cost_per_sample(sample, False)
        if cost is None or not self._of_pullback or not self._is_split:
            return cost
        is_small = number * cost.written <= _IN_GRADIENT
        return cost if is_small else self._cost_per_sample(sample, True)

    def _at_once(self, cost: Cost) -> int:
        if not self._is_split:
            return sys.maxsize
        limit = _IN_GRADIENT if self._of_pullback else _IN_FORWARD_PASS
        return max(_FEWEST, int(limit // max(1, cost.alive)))

    def _size(self, compiled: set[int], key: tuple[Shape, ...], wanted: int, cost: Cost) -> int:
        size = min((size for size in tuple(compiled) if size >= wanted), default=wanted)
        wasted = self._wasted.get((key, wanted), 0) + (size - wanted) * cost.written
        if wasted > cost.operations * _COMPILATION:
            size = wanted
        self._wasted[key, wanted] = wasted
        compiled.add(size)
        return size


def _spreading(function: Callable[..., tuple], devices: Devices) -> Callable[..., tuple]:
    return lambda *arrays: function(*map(devices.spread, arrays))


def _padded(array: Any, missing: int) -> np.ndarray:
    # The last sample again: zeros may be slow to compute with, or give a warning.
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
