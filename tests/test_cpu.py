"""What is computed in another way on a CPU is the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xplique_flax import cpu

RNG = np.random.default_rng(0)


def is_left_to_xla(jitted, *arguments):
    return "select_and_scatter_add" in str(jitted.trace(*arguments).jaxpr)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((2, 2), (2, 2), "VALID"),
        ((3, 3), (2, 2), ((1, 1), (1, 1))),
        ((3, 3), (1, 1), "SAME"),
        ((2, 2), (3, 3), "VALID"),
        ((2, 3), (1, 2), "SAME"),
        ((1, 1), (2, 2), "VALID"),
    ],
)
def test_gradient_of_max_pooling_goes_to_the_first_maximum(window, strides, padding, dtype):
    # Rounded and cut at zero, many windows have several maxima.
    images = jnp.maximum(jnp.round(jnp.array(RNG.normal(size=(2, 9, 10, 3))), 1), 0).astype(dtype)

    def pool(x):
        return nn.max_pool(x, window, strides, padding)

    upstream = jnp.array(RNG.normal(size=pool(images).shape), dtype)

    def gradient(x, upstream):
        return jax.vjp(pool, x)[1](upstream)[0]

    expected = jax.jit(gradient)(images, upstream)
    given = cpu.compiled(gradient)(images, upstream)
    assert (given.shape, given.dtype) == (expected.shape, expected.dtype)
    # Where windows overlap, sums may be taken in another order.
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    np.testing.assert_allclose(
        *(np.asarray(a, "float32") for a in (given, expected)), atol=tolerance
    )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_max_pooling_is_found_inside_of_calls(wrap):
    pool = wrap(lambda x: nn.max_pool(x, (2, 2), (2, 2)))

    def gradient(x):
        return jax.grad(lambda y: (pool(y) ** 2).sum())(x)

    images = jnp.array(RNG.normal(size=(2, 4, 4, 1)), "float32")
    assert is_left_to_xla(jax.jit(gradient), images)
    assert not is_left_to_xla(cpu.compiled(gradient), images)
    np.testing.assert_allclose(cpu.compiled(gradient)(images), gradient(images), rtol=1e-6)


def test_nothing_is_replaced_on_other_devices(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def gradient(x):
        return jax.grad(lambda y: (nn.max_pool(y, (2, 2), (2, 2)) ** 2).sum())(x)

    images = np.ones((2, 4, 4, 1), "float32")
    assert is_left_to_xla(cpu.compiled(gradient), images)


def test_options_that_xla_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(cpu, "_OPTIONS", {"xla_no_such_option": True})
    cpu._known_options.cache_clear()
    try:
        assert cpu._known_options() == {}
        assert cpu.compiled(lambda x: x + 1)(1.0) == 2
    finally:
        cpu._known_options.cache_clear()
