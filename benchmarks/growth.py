"""How the time of an explanation grows with the number of images, of samples, and of pixels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.methods import methods
from benchmarks.networks import NETWORKS, small_cnn_twin
from benchmarks.recorded import timed
from benchmarks.tools import TOOLS

COMPARED = ("xplique_flax", "native Keras", "jax2tf")
# For each row of a table: the method, the images per call, the samples, and the images' size.
GROWN: dict[str, dict[int, tuple[str, int, int, int]]] = {
    "Saliency, images per call": {n: ("Saliency", n, 1, 48) for n in (1, 4, 16, 64, 256)},
    "RISE of one image, samples": {n: ("Rise", 1, n, 48) for n in (32, 128, 512, 2048)},
    "Saliency of four images, pixels of a side": {
        n: ("Saliency", 4, 1, n) for n in (24, 48, 96, 192)
    },
}


def time_growth(rounds: int) -> dict[str, dict[int, dict[str, float]]]:
    """Return the median time of each tool for each size."""
    found: dict[str, Any] = {}
    for what, sizes in GROWN.items():
        found[what] = {}
        for size, task in sizes.items():
            found[what][size] = row = _medians(rounds, *task)
            shown = " ".join(f"{seconds:8.4f}" for seconds in row.values())
            print(f"{what}: {size:5}", shown, flush=True)
    return found


def _medians(rounds: int, method: str, number: int, samples: int, side: int) -> dict[str, float]:
    network = replace(
        NETWORKS["cnn"], sample=(side, side, 3), make_twin=partial(small_cnn_twin, side)
    )
    variables = network.variables()
    inputs, targets = network.data(number)
    prepare = methods(network.sample, samples)[method]
    calls = {name: prepare(TOOLS[name](network, variables), inputs, targets) for name in COMPARED}
    for call in calls.values():
        call()
    seconds = [{name: timed(call) for name, call in calls.items()} for _ in range(rounds)]
    return {name: float(np.median([each[name] for each in seconds])) for name in calls}
