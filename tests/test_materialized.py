"""Flattened samples are the same, and XLA does not join them with what is flattened."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_cpu import given_to_xla, traced
from xplique_flax import cpu

RNG = np.random.default_rng(0)
IMAGES = jnp.array(RNG.normal(size=(4, 16, 18, 32)), "float32")
WEIGHTS = jnp.array(RNG.normal(scale=0.02, size=(8 * 9 * 32, 5)), "float32")


def pooled(images):
    return nn.max_pool(nn.relu(images), (2, 2), (2, 2))


def classified(_, images):
    return nn.tanh(pooled(images).reshape(len(images), -1)) @ WEIGHTS


def gradient(_, images):
    return jax.grad(lambda x: (classified(None, x) ** 2).sum())(images)


@pytest.mark.parametrize("function", [classified, gradient])
def test_flattened_samples_are_the_same(function):
    compiled = cpu.Compiled(function)
    assert "name=same" in given_to_xla(compiled, IMAGES)
    np.testing.assert_allclose(compiled(None, IMAGES), function(None, IMAGES), atol=1e-5)


def test_what_is_flattened_is_computed_before():
    """Or XLA would find each number of a row by dividing its place."""
    text = traced(cpu.Compiled(classified), IMAGES).lower().compile().as_text()
    assert "= f32[4,8,9,32]{3,2,1,0} fusion(" in text


OTHERS = {
    "few numbers": lambda x: pooled(x[:, :4, :4, :4]).reshape(len(x), -1),
    "all samples": lambda x: pooled(x).reshape(2, -1),
    "parts of samples": lambda x: pooled(x).reshape(len(x), 8, -1),
    "a column": lambda x: pooled(x).ravel().reshape(-1, 1),
    "another order": lambda x: jax.lax.reshape(pooled(x), (4, 2304), (0, 3, 1, 2)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_reshaping_is_left_to_xla(name):
    compiled = cpu.Compiled(lambda _, x: OTHERS[name](x))
    assert "name=same" not in given_to_xla(compiled, IMAGES)
    np.testing.assert_array_equal(compiled(None, IMAGES), OTHERS[name](IMAGES))


def test_it_is_left_to_xla_with_several_devices(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    compiled = cpu.Compiled(classified)
    assert "name=same" not in given_to_xla(compiled, IMAGES)
