"""The methods of Xplique that are timed, each with an amount of work that fits the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from xplique import attributions, metrics

Explain = Callable[[], Any]
Method = Callable[[Any, np.ndarray, np.ndarray], Explain]

GRADIENTS = (
    "Saliency",
    "GradientInput",
    "IntegratedGradients",
    "SmoothGrad",
    "SquareGrad",
    "VarGrad",
)
PERTURBATIONS = ("Occlusion", "Rise", "SobolAttributionMethod", "HsicAttributionMethod")
SURROGATES = ("Lime", "KernelShap")
METRICS = ("Deletion", "Insertion", "MuFidelity")
INSIDE = ("GradCAM", "GradCAMPP", "FEM", "GuidedBackprop", "DeconvNet")
OF_IMAGES = ("GradCAM", "GradCAMPP", "FEM", "SobolAttributionMethod", "HsicAttributionMethod")


def methods(sample: tuple[int, ...], samples: int, **common: Any) -> dict[str, Method]:
    """Return the methods that explain samples of a shape, with so many model calls for each.

    The further arguments are those that all explainers take, such as `batch_size`.
    """
    is_image = len(sample) == 3
    patch: Any = sample[0] // 6 if is_image else 1
    power = 2 ** round(np.log2(samples / 8))  # Sobol draws a design of powers of two
    arguments: dict[str, dict[str, Any]] = {
        "IntegratedGradients": {"steps": samples},
        "SmoothGrad": {"nb_samples": samples},
        "SquareGrad": {"nb_samples": samples},
        "VarGrad": {"nb_samples": samples},
        "Occlusion": {"patch_size": patch, "patch_stride": patch},
        "Rise": {"nb_samples": samples, "grid_size": 7},
        "SobolAttributionMethod": {"grid_size": 4, "nb_design": max(1, power // 2)},
        "HsicAttributionMethod": {"grid_size": 4, "nb_design": samples},
        "Lime": {"nb_samples": samples},
        "KernelShap": {"nb_samples": samples},
    }
    names = GRADIENTS + PERTURBATIONS + SURROGATES + INSIDE
    found = {
        name: _explained_by(getattr(attributions, name), common | arguments.get(name, {}))
        for name in names
        if is_image or name not in OF_IMAGES
    }
    steps = {"Deletion": {"steps": samples}, "Insertion": {"steps": samples}}
    kwargs = steps | {"MuFidelity": {"nb_samples": samples}}
    if not is_image:
        kwargs["MuFidelity"]["grid_size"] = None
    return found | {name: _scored_by(getattr(metrics, name), kwargs[name]) for name in METRICS}


def _explained_by(method: Any, arguments: dict[str, Any]) -> Method:
    def prepare(model: Any, inputs: np.ndarray, targets: np.ndarray) -> Explain:
        explainer = method(model, **arguments)
        return lambda: explainer(inputs, targets)

    return prepare


def _scored_by(metric: Any, arguments: dict[str, Any]) -> Method:
    def prepare(model: Any, inputs: np.ndarray, targets: np.ndarray) -> Explain:
        scorer = metric(model, inputs, targets, **arguments)
        maps = np.abs(inputs.mean(-1)) if inputs.ndim == 4 else np.abs(inputs)
        return lambda: scorer(maps)

    return prepare
