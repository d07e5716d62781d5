"""Time Xplique with each tool in turn: `make bench`, or `make bench ARGS="cnn --rounds 9"`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import tensorflow as tf
from threadpoolctl import threadpool_limits

from benchmarks.alone import time_alone
from benchmarks.growth import time_growth
from benchmarks.methods import INSIDE, Explain, methods
from benchmarks.networks import NETWORKS, Network
from benchmarks.pipelines import untuned
from benchmarks.recorded import PureJax, in_a_row, recorded, timed
from benchmarks.tools import TOOLS, as_needed_by, computed_by_jax

PACKAGES = ("xplique-flax", "xplique", "tensorflow", "keras", "jax", "jaxlib", "flax", "numpy")
if find_spec("torch"):
    PACKAGES += ("torch",)
MODEL_CALLS = ("in model calls", "JAX in place", "pure JAX")
LOOK_INSIDE = ("xplique_flax", "native Keras")
# Short calls are repeated, for so many seconds with one tool, to at most so many rounds.
_ENOUGH, _MOST_ROUNDS = 1.0, 25
# What takes more than so many times as long as xplique_flax is called in few rounds.
_SLOW, _FEW_ROUNDS = 2, 5
_ORDER = random.Random(0)
# Inputs, and model calls for each: so that a call takes from a tenth of a second to a few.
WORK = {"cnn": (4, 64), "resnet": (1, 8), "mlp": (16, 64), "vit": (4, 64)}


def main() -> None:
    """Print one line for each method, and write all numbers to a file."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=", ".join(NETWORKS))
    parser.add_argument("--methods", nargs="*", help="names of methods; by default all")
    parser.add_argument("--rounds", type=int, default=11, help="calls that the median is of")
    parser.add_argument("--alone", nargs="*", default=list(NETWORKS), help="for first calls")
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tf.get_logger().setLevel("ERROR")
    results: dict[str, Any] = {"machine": machine(), "networks": {}, "alone": {}}
    print(json.dumps(results["machine"], indent=2))
    for name in options.networks:
        print(f"\n{name}: seconds of {', '.join((*TOOLS, *MODEL_CALLS))}", flush=True)
        rows = time_network(NETWORKS[name], *WORK[name], options.methods, options.rounds)
        results["networks"][name] = rows
        if name in options.alone:
            print(f"{name}: first calls, and peak memory", flush=True)
            results["alone"][name] = time_alone(name, list(TOOLS), *WORK[name])
            for method, found in results["alone"][name].items():
                cell = "{seconds:.2f} s {MB:.0f}, {later MB:.0f} MB"
                shown = [cell.format(**each) for each in found.values()]
                print(f"{method:24}", "; ".join(shown), flush=True)
        options.to.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print("\nHow the time of the small convolutional network grows, in seconds", flush=True)
    results["growth"] = time_growth(options.rounds)
    options.to.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def machine() -> dict[str, str]:
    """Return what the times depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "GFLOP/s of a product of matrices": f"{_matrix_product():.0f}",
        "Python": platform.python_version(),
    } | {package: version(package) for package in PACKAGES}


def _matrix_product(size: int = 2048) -> float:
    matrix = jax.numpy.ones((size, size))
    multiply = jax.jit(jax.numpy.matmul)
    seconds = [timed(lambda: multiply(matrix, matrix)) for _ in range(9)]
    return 2 * size**3 / float(np.median(seconds)) / 1e9


def time_network(
    network: Network, number: int, samples: int, chosen: list[str] | None, rounds: int
) -> dict[str, Any]:
    """Return the times of each method with each tool."""
    variables = network.variables()
    inputs, targets = network.data(number)
    models = {name: make(network, variables) for name, make in TOOLS.items()}
    pure = PureJax(network.module, variables)
    rows = {}
    for method, prepare in methods(network.sample, samples).items():
        if chosen and method not in chosen:
            continue
        names = LOOK_INSIDE if method in INSIDE else TOOLS
        calls = {}
        for tool in names:
            with as_needed_by(tool):
                calls[tool] = prepare(models[tool], inputs, targets)
        rows[method] = row = time_method(calls, rounds)
        if method not in INSIDE:
            by_jax = partial(_by_jax, network, variables, prepare, inputs, targets)
            ours = models["xplique_flax"], calls["xplique_flax"]
            row |= time_model_calls(*ours, by_jax, pure, rounds)
        print(f"{method:24}", " ".join(f"{value:8.3f}" for value in row.values()), flush=True)
    return rows


def _by_jax(network: Network, variables: Any, prepare: Callable, inputs: Any, targets: Any) -> None:
    prepare(computed_by_jax(network, variables), inputs, targets)()


def time_method(calls: dict[str, Explain], rounds: int) -> dict[str, float]:
    """Return the median time of each tool, called in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    later = {}
    for name, call in calls.items():
        with as_needed_by(name):
            timed(call)
            later[name] = timed(call)
    quick = later["xplique_flax"]
    close = [name for name in calls if later[name] <= _SLOW * quick]
    for number in range(_rounds(rounds, quick)):
        names = list(calls) if number < _FEW_ROUNDS else close
        # What a tool leaves behind, such as busy threads, slows the next one.
        for name in _ORDER.sample(names, len(names)):
            with as_needed_by(name):
                found[name].append(timed(calls[name]))
    return _medians(found)


def time_model_calls(
    model: tf.keras.Model, call: Explain, by_jax: Callable, pure: PureJax, rounds: int
) -> dict[str, float]:
    """Return the times of an explanation's batches: in it, in it by JAX alone, by JAX in a row.

    Where the wrapper does not call JAX, its time too is that of the batches in a row, in a graph of
    TensorFlow, less that of a graph without the model. The batches are those of ``by_jax``.

    This comes after the calls of all tools: JAX alone gives hundreds of megabytes back to the
    system, and whatever comes next has to ask for them again: in each round, a call that is not
    timed.
    """
    rounds = _rounds(rounds, timed(call))
    found: dict[str, list[float]] = defaultdict(list)
    batches = recorded(call)
    is_recorded = bool(batches)
    if not is_recorded:
        batches = recorded(by_jax)
        in_graph, in_empty_graph = in_a_row(model, batches), in_a_row(None, batches)
        in_graph()
        in_empty_graph()
    pure.run(batches)
    for _ in range(rounds):
        call()
        if is_recorded:
            batches = recorded(call)
            found["in model calls"].append(sum(batch.seconds for batch in batches))
            in_place = recorded(call, pure.execute)
            found["JAX in place"].append(sum(batch.seconds for batch in in_place))
        else:
            found["in model calls"].append(timed(in_graph) - timed(in_empty_graph))
        found["pure JAX"].append(timed(lambda batches=batches: pure.run(batches)))
    return _medians(found)


def _rounds(rounds: int, seconds: float) -> int:
    return max(rounds, min(_MOST_ROUNDS, int(_ENOUGH / seconds)))


def _medians(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: float(np.median(values)) for name, values in found.items()}


# Kernel SHAP leaves threads for linear algebra busy, which slow whatever is timed next.
with untuned(), threadpool_limits(1, "blas"):
    main()
