"""Batches spread over several devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Devices:
    """Devices that hold all parameters each, and a part of each batch.

    Parameters
    ----------
    devices
        Devices of this process.
    """

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.count = len(devices)
        mesh = Mesh(np.array(devices), ("batch",), axis_types=(AxisType.Auto,))
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._spread = NamedSharding(mesh, PartitionSpec("batch"))

    def replicated(self, array: Any) -> jax.Array:
        """Return the array with a copy of it on each device."""
        return jax.device_put(array, self._whole)

    def spread(self, array: Any) -> jax.Array:
        """Return the array with its first axis spread; the number of devices divides its size."""
        return jax.device_put(array, self._spread)
