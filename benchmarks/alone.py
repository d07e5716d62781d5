"""First calls and peak memory: each tool explains twice in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# The arguments of each: one batch of all samples shows whether memory grows with them. Without
# a `batch_size`, Integrated Gradients would compute as many samples at once as there are inputs.
METHODS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "IntegratedGradients": {"batch_size": 1024},
    "Rise": {},
}
PURE_JAX = "pure JAX"


def time_alone(network: str, tools: list[str], number: int, samples: int) -> dict[str, Any]:
    """Return for each method and tool the seconds of the first call, and both peaks in MB."""
    rows: dict[str, Any] = {}
    for method in METHODS:
        rows[method] = {}
        shapes: Any = None
        for tool in [*tools, PURE_JAX]:
            task = {
                "network": network,
                "tool": tool,
                "method": method,
                "number": number,
                "samples": samples,
                "shapes": shapes,
            }
            command = [sys.executable, "-m", "benchmarks.alone", json.dumps(task)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(run.stdout.splitlines()[-1])
            shapes = found.pop("shapes", shapes)
            rows[method][tool] = found
    return rows


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Explain twice with one tool."""
    import numpy as np

    from benchmarks.methods import methods
    from benchmarks.networks import NETWORKS
    from benchmarks.pipelines import untuned
    from benchmarks.recorded import Batch, PureJax, recorded
    from benchmarks.tools import TOOLS, as_needed_by, computed_by_jax

    network = NETWORKS[task["network"]]
    variables = network.variables()
    tool, number = task["tool"], task["number"]
    inputs, targets = network.data(number)
    if tool == PURE_JAX:
        pure = PureJax(network.module, variables)
        batches = [
            Batch([np.ones(shape, "float32") for shape in shapes], 0) for shapes in task["shapes"]
        ]
        return _called_twice(lambda: pure.run(batches))
    method = task["method"]
    prepare = methods(network.sample, task["samples"], **METHODS[method])[method]
    model = TOOLS[tool](network, variables)
    with as_needed_by(tool), untuned():
        call = prepare(model, inputs, targets)
        found = _called_twice(call)
    if tool == "xplique_flax":
        batches = recorded(call) or recorded(
            lambda: prepare(computed_by_jax(network, variables), inputs, targets)()
        )
        found["shapes"] = [[array.shape for array in batch.arrays] for batch in batches]
    return found


def _called_twice(call: Any) -> dict[str, Any]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be used without being counted
    before = memory("VmRSS")
    start = time.perf_counter()
    peaks = {"MB": _peak(call) - before}
    return {"seconds": time.perf_counter() - start, **peaks, "later MB": _peak(call) - before}


def _peak(call: Any) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # which forgets the peak so far
    call()
    return memory("VmHWM")


def memory(name: str) -> float:
    """Return in MB what Linux says of this process: ``VmRSS``, or ``VmHWM`` for its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024 / 1e6  # type: ignore[index]


if __name__ == "__main__":
    print("\n" + json.dumps(measure(json.loads(sys.argv[1]))))
