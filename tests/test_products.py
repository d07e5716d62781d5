"""Products with large matrices are the same, whoever computes them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.test_cpu import is_left_to_xla
from xplique_flax import cpu, onednn

RNG = np.random.default_rng(0)
# Elsewhere, what oneDNN would compute is left to XLA as well, and has to be the same too.
USABLE = onednn.is_usable()


@pytest.fixture(autouse=True)
def wide_vectors(monkeypatch):
    monkeypatch.setattr(onednn, "has_wide_vectors", lambda: True)


def normal(*shape, dtype="float32"):
    return jnp.array(RNG.normal(size=shape), dtype)


def gradient_of(apply):
    """Return the gradient of a function of parameters and inputs, by the inputs."""
    return lambda parameters, x: jax.grad(lambda y: (apply(parameters, y) ** 2).sum())(x)


def assert_same(function, parameters, inputs, primitive, is_left, tolerance=1e-5):
    """Compare with XLA, and see whether the primitive is left to it."""
    compiled = cpu.Compiled(function)
    assert is_left_to_xla(primitive, compiled, inputs, parameters=parameters) == is_left
    expected = np.asarray(jax.jit(function)(parameters, inputs), "float32")
    given = np.asarray(compiled(parameters, inputs), "float32")
    largest = abs(expected).max(initial=0)
    np.testing.assert_allclose(given, expected, rtol=0, atol=tolerance * largest)


DENSE = {
    "rows": (nn.Dense(512), (16, 300)),
    "sequence": (nn.Dense(512), (2, 9, 300)),
    "heads": (nn.DenseGeneral((4, 128)), (2, 9, 300)),
    "from heads": (nn.DenseGeneral(300, axis=(-2, -1)), (2, 9, 4, 128)),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, gradient_of], ids=["plain", "jit", "grad"])
def test_dense_layer_is_the_same(name, wrap):
    module, shape = DENSE[name]
    inputs = normal(*shape)
    parameters = module.init(jax.random.key(0), inputs)
    assert_same(wrap(module.apply), parameters, inputs, "dot_general", not USABLE)


def contract(left, right, batched=((), ()), **kwargs):
    return lambda matrix, x: lax.dot_general(x, matrix, ((left, right), batched), **kwargs)


@pytest.mark.parametrize("rows", [2, 15])
def test_few_rows_are_enough_where_the_matrix_is_transposed(rows):
    matrix, inputs = normal(300, 256), normal(rows, 256)
    assert_same(contract([1], [1]), matrix, inputs, "dot_general", not USABLE)
    assert_same(contract([1], [0]), normal(256, 600), inputs, "dot_general", True)


@pytest.mark.parametrize(("rows", "is_left"), [(511, True), (512, not USABLE)])
def test_many_rows_are_needed_without_wide_vectors(rows, is_left, monkeypatch):
    monkeypatch.setattr(onednn, "has_wide_vectors", lambda: False)
    inputs = normal(rows, 256)
    assert_same(contract([1], [0]), normal(256, 600), inputs, "dot_general", is_left)
    assert_same(contract([1], [1]), normal(300, 256), inputs, "dot_general", not USABLE)


LEFT = {
    "outer": (contract([], []), (20,), (256, 600)),
    "of nothing": (contract([1], [0]), (20, 0), (0, 600)),
    "without rows": (contract([1], [0]), (0, 256), (256, 600)),
    "one row": (contract([1], [1]), (1, 256), (300, 256)),
    "small": (contract([1], [1]), (20, 255), (256, 255)),
    "small, not transposed": (contract([1], [0]), (20, 256), (256, 511)),
    "a few columns": (contract([1], [0]), (20, 50_000), (50_000, 3)),
    "a few columns, transposed": (contract([1], [1]), (20, 3), (50_000, 3)),
    "rows last": (contract([0], [0]), (256, 20), (256, 600)),
    "in another order": (contract([1, 2], [1, 0]), (20, 16, 16), (16, 16, 600)),
    "in the middle": (contract([1], [1]), (20, 32), (64, 32, 128)),
    "of each sample": (contract([2], [2], ([0], [0])), (2, 20, 256), (2, 600, 256)),
    "approximate": (
        contract([1], [0], precision=lax.DotAlgorithmPreset.BF16_BF16_F32),
        (20, 256),
        (256, 600),
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_products_are_left_to_xla(name):
    function, *shapes = LEFT[name]
    inputs, matrix = (normal(*shape) for shape in shapes)
    assert_same(function, matrix, inputs, "dot_general", is_left=True)


@pytest.mark.parametrize(("given", "returned"), [("bfloat16", None), ("float32", "bfloat16")])
def test_product_in_half_precision_is_left_to_xla(given, returned):
    inputs, matrix = normal(20, 256, dtype=given), normal(256, 600, dtype=given)
    product = contract([1], [0], preferred_element_type=returned)
    assert_same(product, matrix, inputs, "dot_general", True, tolerance=0.01)


POINTWISE = {
    "plain": (nn.Conv(512, (1, 1)), (2, 5, 4, 300)),
    "strided": (nn.Conv(512, (1, 1), (2, 3)), (4, 6, 5, 300)),
    "padded": (nn.Conv(512, (1, 1), padding=((1, 2), (0, 1))), (2, 5, 4, 300)),
    "series": (nn.Conv(512, (1,), (2,)), (4, 9, 300)),
    "volume": (nn.Conv(512, (1, 1, 1), (1, 2, 1)), (2, 3, 4, 3, 300)),
}
FEW = {
    "small": (nn.Conv(30, (1, 1)), (2, 5, 4, 300)),
    "half": (nn.Conv(512, (1, 1), dtype="bfloat16"), (2, 5, 4, 300)),
    "grouped": (nn.Conv(1024, (1, 1), feature_group_count=2), (2, 5, 4, 300)),
    "few places": (nn.Conv(512, (1, 1), (2, 2)), (2, 5, 4, 300)),
    "patches": (nn.Conv(512, (2, 2), (2, 2)), (4, 6, 8, 300)),
    "strided and padded": (nn.Conv(512, (1, 1), (2, 2), padding=1), (4, 5, 4, 300)),
}


def flips(parameters):
    """Return which kernels are kept reversed."""
    kernel = parameters["params"]["kernel"]
    return [key for key in cpu._kept if key[0] == id(kernel)]


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_convolution_is_the_same_and_its_kernel_is_not_kept_twice(name):
    module, shape = POINTWISE[name]
    images = normal(*shape)
    parameters = module.init(jax.random.key(0), images)
    primitive = "conv_general_dilated"
    assert_same(module.apply, parameters, images, primitive, not USABLE)
    assert_same(gradient_of(module.apply), parameters, images, primitive, not USABLE)
    assert bool(flips(parameters)) == (not USABLE)


@pytest.mark.parametrize("name", FEW)
def test_other_pointwise_convolutions_are_left_to_xla(name):
    module, shape = FEW[name]
    images = normal(*shape)
    parameters = module.init(jax.random.key(0), images)
    tolerance = 0.02 if name == "half" else 1e-5
    for function in (module.apply, gradient_of(module.apply)):
        assert_same(function, parameters, images, "conv_general_dilated", True, tolerance)


def test_large_kernel_of_another_layout_is_still_kept_reversed():
    images, kernel = normal(2, 300, 5, 4), normal(512, 300, 1, 1)

    def convolve(parameters, x):
        return lax.conv_general_dilated(x, parameters["params"]["kernel"], (1, 1), "SAME")

    parameters = {"params": {"kernel": kernel}}
    assert_same(gradient_of(convolve), parameters, images, "conv_general_dilated", True)
    assert flips(parameters)


def test_products_are_left_to_xla_where_onednn_can_not_be_asked_for(monkeypatch):
    monkeypatch.setattr(onednn, "is_usable", lambda: False)
    monkeypatch.setattr(onednn, "has_wide_vectors", lambda: True)
    module, images = nn.Conv(512, (1, 1)), normal(2, 5, 4, 300)
    parameters = module.init(jax.random.key(0), images)
    assert_same(gradient_of(module.apply), parameters, images, "conv_general_dilated", is_left=True)
    assert flips(parameters)
    assert_same(contract([1], [1]), normal(300, 256), normal(9, 256), "dot_general", is_left=True)
    assert_same(contract([1], [0]), normal(256, 600), normal(20, 256), "dot_general", is_left=True)
