"""Convolutions with zeros between their inputs are the same, and compute without the zeros."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.test_cpu import given_to_xla
from xplique_flax import cpu, onednn

RNG = np.random.default_rng(0)
SIZES = {1: (70,), 2: (10, 9), 3: (5, 4, 6)}
COMPUTED = {
    "plain": {},
    "valid": {"padding": "VALID"},
    "circular": {"padding": "CIRCULAR"},
    "true": {"transpose_kernel": True},
    "even": {"kernel_size": (4, 4)},
    "as wide as the step": {"kernel_size": (2, 2)},
    "uneven": {"kernel_size": (5, 3), "strides": (3, 2)},
    "one step": {"strides": (1, 2)},
    "padded": {"padding": ((3, 4), (0, 1))},
    "cropped": {"padding": ((-1, -2), (1, -1))},
    "many phases": {"kernel_size": (6, 5), "strides": (5, 4)},
    "series": {"kernel_size": (5,), "strides": (2,)},
    "volume": {"kernel_size": (3, 2, 3), "strides": (2, 1, 3)},
}
LEFT = {
    "dilated": {"kernel_dilation": (2, 1)},
    "gaps": {"kernel_size": (3, 1)},
    "half": {"dtype": "bfloat16"},
    "no results": {"padding": ((-18, 1), (1, 1))},
}


@pytest.fixture(params=[True, False], ids=["oneDNN", "XLA"])
def _onednn(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(onednn, "is_usable", lambda: False)


def example(make, features, count=2, **kwargs):
    """Return a module, its parameters and images of as many channels."""
    kwargs = {"kernel_size": (3, 3), "strides": (2, 2)} | kwargs
    module = make(features, **kwargs)
    shape = count, *SIZES[len(module.kernel_size)], features
    images = jnp.array(RNG.normal(size=shape), "float32")
    return module, module.init(jax.random.key(0), images), images


def has_zeros(function, parameters, images):
    """Return whether what is given to XLA has a convolution with zeros between its inputs."""
    text = given_to_xla(cpu.Compiled(function), images, parameters=parameters)
    return any(step != "1" for steps in _dilations(text) for step in steps)


def _dilations(text):
    return [re.findall(r"\d+", found) for found in re.findall(r"lhs_dilation=\(([^)]*)\)", text)]


def assert_same(function, parameters, images, tolerance=1e-5):
    given = cpu.Compiled(function)(parameters, images)
    expected = jax.jit(function)(parameters, images)
    assert (given.shape, given.dtype) == (expected.shape, expected.dtype)
    given, expected = (np.asarray(array, "float32") for array in (given, expected))
    largest = abs(expected).max(initial=1)
    np.testing.assert_allclose(given, expected, rtol=10 * tolerance, atol=tolerance * largest)


def convolution(numbers, strides, padding, steps):
    """Return JAX's convolution itself, of inputs that have a step from one to the next."""

    def convolve(kernel, x):
        return lax.conv_general_dilated(
            x, kernel, strides, padding, lhs_dilation=steps, dimension_numbers=numbers
        )

    return convolve


@pytest.mark.usefixtures("_onednn")
@pytest.mark.parametrize("features", [3, 17], ids=["few", "many"])
@pytest.mark.parametrize("name", COMPUTED)
def test_transposed_convolution_is_the_same(name, features):
    module, parameters, images = example(nn.ConvTranspose, features, **COMPUTED[name])
    assert not has_zeros(module.apply, parameters, images)
    assert_same(module.apply, parameters, images)


@pytest.mark.usefixtures("_onednn")
@pytest.mark.parametrize("features", [3, 17], ids=["few", "many"])
@pytest.mark.parametrize("name", [name for name in COMPUTED if name not in ("true", "cropped")])
def test_gradient_of_a_strided_convolution_is_the_same(name, features):
    kwargs = COMPUTED[name]
    if isinstance(kwargs.get("padding"), tuple):
        kwargs = kwargs | {"padding": ((2, 1), (0, 3))}
    module, parameters, images = example(nn.Conv, features, count=30, **kwargs)

    def gradient(parameters, x):
        return jax.grad(lambda y: (module.apply(parameters, y) ** 2).sum())(x)

    assert not has_zeros(gradient, parameters, images)
    assert_same(gradient, parameters, images)


@pytest.mark.parametrize(
    ("features", "name", "count"),
    [(3, "plain", 1), (17, "plain", 4), (17, "even", 1), (17, "many phases", 1)],
)
def test_phases_are_computed_at_once_where_that_pays(features, name, count, monkeypatch):
    monkeypatch.setattr(onednn, "is_usable", lambda: False)
    module, parameters, images = example(nn.ConvTranspose, features, **COMPUTED[name])
    text = given_to_xla(cpu.Compiled(module.apply), images, parameters=parameters)
    assert text.count(" conv_general_dilated[") == count


@pytest.mark.parametrize("name", LEFT)
def test_other_convolutions_are_left_to_xla(name):
    module, parameters, images = example(nn.ConvTranspose, 3, **LEFT[name])
    assert has_zeros(module.apply, parameters, images)
    assert_same(module.apply, parameters, images, 0.01 if name == "half" else 1e-5)


def test_few_inputs_are_left_to_xla():
    module, parameters, images = example(nn.ConvTranspose, 3, count=1)
    assert has_zeros(module.apply, parameters, images)
    assert_same(module.apply, parameters, images)


def test_strided_convolution_of_inputs_with_zeros_is_left_to_xla():
    images = jnp.array(RNG.normal(size=(3, 9, 9, 3)), "float32")
    kernel = jnp.array(RNG.normal(size=(3, 3, 3, 3)), "float32")

    convolve = convolution(("NHWC", "HWIO", "NHWC"), (1, 3), [(0, 0)] * 2, (2, 2))

    assert has_zeros(convolve, kernel, images)
    assert_same(convolve, kernel, images)


def test_negative_padding_is_carried_out():
    # With (-1, 1), which one phase needs, XLA's convolution reads what is not there.
    images = jnp.array(RNG.normal(size=(20, 7, 4)), "float32")
    kernel = jnp.array(RNG.normal(size=(5, 4, 16)), "float32")

    convolve = convolution(("NHC", "HIO", "NHC"), (1,), [(-2, 4)], (3,))

    assert not has_zeros(convolve, kernel, images)
    assert_same(convolve, kernel, images)


def test_kernel_may_be_stored_in_another_order():
    images = jnp.array(RNG.normal(size=(2, 9, 10, 4)), "float32")
    kernel = jnp.array(RNG.normal(size=(5, 3, 4, 3)), "float32")

    convolve = convolution(("NHWC", "OHIW", "NHWC"), (1, 1), [(2, 1)] * 2, (2, 2))

    assert not has_zeros(convolve, kernel, images)
    assert_same(convolve, kernel, images)
