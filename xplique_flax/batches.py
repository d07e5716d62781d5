"""The sizes in which batches are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .devices import Devices
from .samples import Cost

Shape = tuple[int, ...]

# Bytes that the operations of a model write, which stand for time and memory alike. More than that
# at once leaves the processor's cache: a gradient then takes up to twice as long.
_AT_ONCE = 64e6
_FEWEST = 4
# About what it costs to compile one operation. Padding may waste as much for each size.
_COMPILATION = 1e7


class Batches:
    """The batch sizes that a function is compiled for, and those that batches are run in.

    A batch that is smaller than one that the function was compiled for is padded to its size, for
    as long as that costs less than to compile the function again. If samples depend on each other,
    each batch is run as it is.

    Parameters
    ----------
    cost_per_sample
        Returns for the shape of a sample what each costs, or ``None`` if the samples depend on
        each other.
    devices
        Devices to spread batches over, where samples do not depend on each other.
    split
        Whether to run large batches in equal pieces.
    """

    def __init__(
        self,
        cost_per_sample: Callable[[Shape], Cost | None],
        devices: Devices | None = None,
        split: bool = False,
    ) -> None:
        self._cost_per_sample = cost_per_sample
        self._devices = devices
        self._count = devices.count if devices else 1
        self._split = split
        self._compiled: dict[tuple[Shape, ...], set[int]] = {}
        self._wasted: dict[tuple[tuple[Shape, ...], int], float] = {}

    def of_pullback(self) -> Batches:
        """Return the same for the function's gradient."""
        return Batches(self._cost_per_sample, self._devices, split=True)

    def run(self, function: Callable[..., tuple], arrays: Sequence[Any]) -> Sequence[Any]:
        """Call the function with arrays whose first axis is the batch."""
        number = len(arrays[0])
        key = tuple(array.shape[1:] for array in arrays)
        if self._devices and number and self._cost_per_sample(key[0]) is not None:
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
        if number == 0 or (number in compiled and not self._split):
            return 1, number
        uses_cost = compiled or self._split or self._devices
        cost = self._cost_per_sample(key[0]) if uses_cost else None
        if cost is None:
            compiled.add(number)
            return 1, number
        pieces = 1
        if self._split:
            pieces = math.ceil(number / (max(_FEWEST, _AT_ONCE // cost.written) * self._count))
        wanted = math.ceil(number / pieces / self._count) * self._count
        return pieces, self._size(compiled, key, wanted, cost)

    def _size(self, compiled: set[int], key: tuple[Shape, ...], wanted: int, cost: Cost) -> int:
        size = min((size for size in compiled if size >= wanted), default=wanted)
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
