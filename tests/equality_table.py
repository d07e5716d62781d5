"""How far the explanations of wrapped Flax models are from those of their Keras twins.

`python -m tests.equality_table` prints the largest relative differences as a Markdown table.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from tests.architectures import ARCHITECTURES, Pair, make_pair, tf

# isort: split
from xplique import attributions

tf.get_logger().setLevel("ERROR")  # no word on each new trace: there are two models per pair

TOLERANCE = 1e-4

# Few perturbations: both models are asked the same, so nothing is won by asking often.
METHODS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "GradientInput": {},
    "IntegratedGradients": {"steps": 8},
    "SmoothGrad": {"nb_samples": 6},
    "SquareGrad": {"nb_samples": 6},
    "VarGrad": {"nb_samples": 6},
    "GradCAM": {},
    "GradCAMPP": {},
    "FEM": {},
    "GuidedBackprop": {},
    "DeconvNet": {},
    "Occlusion": {"patch_size": 2, "patch_stride": 2},
    "Rise": {"nb_samples": 20, "grid_size": 4},
    "SobolAttributionMethod": {"grid_size": 4, "nb_design": 4},
    "HsicAttributionMethod": {"grid_size": 4, "nb_design": 32},
    "Lime": {"nb_samples": 80},
    "KernelShap": {"nb_samples": 80},
}


def seed_everything(seed: int = 0) -> None:
    random.seed(seed)
    np.random.seed(seed)
    tf.random.set_seed(seed)


def _blocks(sample: tf.Tensor) -> tf.Tensor:
    """Sixteen squares as the features that LIME perturbs in a picture."""
    index = np.arange(sample.shape[0]) * 4 // sample.shape[0]
    return tf.constant(4 * index[:, None] + index, tf.int32)


def make_explainer(pair: Pair, model: Any, method: str, **options: Any) -> Any:
    """An explainer of Xplique for one of the two models of a pair."""
    options = {**METHODS[method], **options}
    if method != "FEM":
        options.setdefault("operator", pair.architecture.operator)
    if method in ("Lime", "KernelShap") and pair.inputs.ndim == 4:
        options["map_to_interpret_space"] = _blocks
        options["ref_value"] = np.zeros(pair.inputs.shape[-1], np.float32)
    return getattr(attributions, method)(model, **options)


def explain(pair: Pair, model: Any, method: str, **options: Any) -> np.ndarray:
    """Explanations of a pair's samples, with the seeds set."""
    seed_everything()
    return np.asarray(make_explainer(pair, model, method, **options)(pair.inputs, pair.targets))


def largest_difference(ours: Any, reference: Any) -> float:
    """Largest absolute difference, relative to the largest absolute value of the reference."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape
    assert np.isfinite(reference).all()
    largest = np.abs(reference).max()
    assert largest > 0, "the reference is zero everywhere: equality would mean nothing"
    return float(np.abs(ours - reference).max() / largest)


def compare(pair: Pair, method: str, **options: Any) -> float:
    return largest_difference(
        explain(pair, pair.wrapped, method, **options), explain(pair, pair.twin, method, **options)
    )


def markdown_table(names: Iterable[str]) -> str:
    """Largest relative differences of architectures, by method; a dash where none applies."""
    pairs = [make_pair(name) for name in names]
    lines = [
        "| | " + " | ".join(pair.name for pair in pairs) + " |",
        "| --- |" + " --- |" * len(pairs),
    ]
    for method in METHODS:
        cells = [
            "–" if method in pair.architecture.inapplicable else f"{compare(pair, method):.0e}"
            for pair in pairs
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table(sys.argv[1:] or ARCHITECTURES))
