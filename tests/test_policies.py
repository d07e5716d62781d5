"""Xplique's policies for ReLUs: which are known, and that their gradients are the same in JAX."""

import functools

import jax
import numpy as np
import pytest
import tensorflow as tf
from xplique.commons import model_override

from xplique_flax import policies
from xplique_flax.layers import ReLU

NAMES = ("guided_relu_policy", "deconv_relu_policy", "open_relu_policy")
RNG = np.random.default_rng(0)
ODD = np.array([0, -0.0, 6, np.inf, -np.inf, np.nan], "float32")


def changed(policy, max_value=None, made_for=None):
    layer = ReLU(max_value=max_value, name="relu")
    layer.call = policy(made_for or max_value, 0.0)
    return layer


@pytest.mark.parametrize("max_value", [None, 6.0])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_xplique(name, max_value):
    layer = changed(getattr(model_override, name), max_value)
    gradient = policies.gradient_of(layer)
    inputs, upstream = 5 * RNG.normal(size=(2, 300)).astype("float32")
    inputs = np.concatenate([inputs, np.repeat(ODD, len(ODD))])
    upstream = np.concatenate([upstream, np.tile(ODD, len(ODD))])
    with tf.GradientTape() as tape:
        tensor = tf.constant(inputs)
        tape.watch(tensor)
        expected = layer.call(tensor)
    ceiling = max_value or np.inf
    outputs, pullback = jax.vjp(lambda x: policies.relu(x, ceiling, gradient), inputs)
    np.testing.assert_array_equal(outputs, expected)
    np.testing.assert_array_equal(
        pullback(upstream)[0], tape.gradient(expected, tensor, tf.constant(upstream))
    )


def test_policies_are_told_apart():
    layers = [changed(getattr(model_override, name)) for name in NAMES]
    assert len({policies.gradient_of(layer) for layer in layers}) == len(NAMES)


def test_policy_for_a_relu_with_other_settings_is_not_known():
    policy = model_override.guided_relu_policy
    assert policies.gradient_of(changed(policy, 6.0)) is not None
    assert policies.gradient_of(changed(policy, None, made_for=6.0)) is None
    assert policies.gradient_of(changed(policy, 6.0, made_for=3.0)) is None


def unlike_xplique(max_value=None, threshold=0.0):
    relu = tf.keras.layers.ReLU(max_value=max_value, threshold=threshold)

    @tf.custom_gradient
    def guided_relu(inputs):
        return relu(inputs), lambda g: g * tf.cast(inputs > 0, tf.float32)

    return guided_relu


def test_function_of_the_user_is_not_known():
    assert policies.gradient_of(changed(unlike_xplique)) is None
    layer = ReLU(name="relu")
    layer.call = functools.partial(layer.call)
    assert policies.gradient_of(layer) is None


def test_policy_of_xplique_with_another_gradient_is_not_known(monkeypatch):
    monkeypatch.setattr(model_override, "guided_relu_policy", unlike_xplique)
    assert policies.gradient_of(changed(unlike_xplique)) is None
    monkeypatch.delattr(model_override, "open_relu_policy")
    assert policies.gradient_of(changed(model_override.deconv_relu_policy)) is not None
