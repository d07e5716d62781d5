"""Xplique's policies for the gradients of ReLUs, as gradients in JAX."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf

Gradient = Callable[[Any, Any], Any]
"""Takes whether the inputs of a ReLU are positive, and the gradient of its outputs."""

_INPUTS = np.array([-1, 0, 2, 7, -1, 0, 2, 7], "float32")
_UPSTREAM = np.array([-3, -3, -3, -3, 5, 5, 5, 5], "float32")


class _Policy(NamedTuple):
    gradient: Gradient
    seen: list[float]
    """The gradient for ``_INPUTS`` and ``_UPSTREAM``."""


def _guided(is_positive: Any, upstream: Any) -> Any:
    positive = jnp.maximum(upstream, 0)
    # Xplique multiplies with zero, which is no number for infinity. XLA would make it zero.
    return jnp.where(is_positive, positive, positive - positive)


def _deconv(_: Any, upstream: Any) -> Any:
    return jnp.maximum(upstream, 0)


def _open(_: Any, upstream: Any) -> Any:
    return upstream


_POLICIES = {
    "guided_relu_policy": _Policy(_guided, [0, 0, 0, 0, 0, 0, 5, 5]),
    "deconv_relu_policy": _Policy(_deconv, [0, 0, 0, 0, 5, 5, 5, 5]),
    "open_relu_policy": _Policy(_open, [-3, -3, -3, -3, 5, 5, 5, 5]),
}


def relu(inputs: Any, ceiling: float, gradient: Gradient) -> Any:
    """Compute a ReLU that saturates at a number, or at infinity, and has another gradient."""

    def forward(inputs: Any) -> Any:
        outputs = jnp.maximum(inputs, 0)
        return outputs if ceiling == jnp.inf else jnp.minimum(outputs, ceiling)

    changed = jax.custom_vjp(forward)
    changed.defvjp(
        lambda inputs: (forward(inputs), inputs > 0),
        lambda is_positive, upstream: (gradient(is_positive, upstream),),
    )
    return changed(inputs)


def gradient_of(layer: Any) -> Gradient | None:
    """Return the gradient that Xplique gave to a ReLU of Keras; nothing if it did another thing.

    With it, Guided Backprop and DeconvNet are one compiled function, and not one for each part
    between two ReLUs: Guided Backprop of ResNet-50 takes 0.55 of the time.
    """
    function = inspect.unwrap(vars(layer)["call"])
    for code, policy in _known():
        if getattr(function, "__code__", None) == code and _is_made_for(function, layer):
            return policy.gradient if _has_gradient(function, code, policy) else None
    return None


def _known() -> Iterator[tuple[CodeType, _Policy]]:
    """Yield the code of what Xplique's policies put into a ReLU."""
    module = sys.modules.get("xplique.commons.model_override")
    for name, policy in _POLICIES.items():
        code = getattr(getattr(module, name, None), "__code__", None)
        for constant in code.co_consts if code else ():
            if isinstance(constant, CodeType):
                yield constant, policy


def _is_made_for(function: Callable, layer: Any) -> bool:
    """Return whether a policy computes a ReLU with the same settings."""
    relu = inspect.getclosurevars(function).nonlocals.get("relu")
    return all(
        getattr(relu, name, function) == getattr(layer, name)
        for name in ("max_value", "negative_slope", "threshold")
    )


_checked: dict[CodeType, bool] = {}


def _has_gradient(function: Callable, code: CodeType, policy: _Policy) -> bool:
    """Return whether a policy has the gradient that is expected of its name."""
    if code not in _checked:
        with tf.init_scope():
            _, gradient = function(tf.constant(_INPUTS))
            _checked[code] = np.array_equal(gradient(tf.constant(_UPSTREAM)), policy.seen)
    return _checked[code]
