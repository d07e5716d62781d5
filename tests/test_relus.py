"""ReLUs and what their gradients keep are the same, and need less memory than XLA's."""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.test_cpu import given_to_xla, traced
from xplique_flax import cpu, jaxprs, relus

RNG = np.random.default_rng(0)
SHAPES = [(2, 8, 3), (2, 9, 4, 4), (3, 7, 5), (1, 1, 6), (2, 17), (2, 3, 2, 2, 2), (2, 0, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_come_back_from_bits(shape, monkeypatch):
    monkeypatch.setattr(relus, "_FEWEST_KEPT", 0)
    mask = RNG.normal(size=shape) > 0
    np.testing.assert_array_equal(relus.kept(jnp.array(mask)), mask)
    assert " reduce_sum[" in str(jax.make_jaxpr(relus.kept)(mask))


@pytest.mark.parametrize("shape", [(relus._FEWEST_KEPT,), (2, 9), ()])
def test_small_masks_and_those_of_one_axis_stay(shape):
    mask = jnp.ones(shape, bool)
    assert relus.kept(mask) is mask


FUNCTIONS = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "leaky": nn.leaky_relu,
    "maximum": lambda x: jnp.maximum(x, 0),
    "the other way round": lambda x: jnp.maximum(0, x),
    "another bound": lambda x: jnp.maximum(x, -0.5),
    "compared": lambda x: jnp.where(nn.relu6(x) > 0, x, 0) + (x > 1) * x + (x < 2) * nn.relu(x),
    "of two": lambda x: jnp.maximum(x, x[..., ::-1]),
    "of integers": lambda x: x * jnp.maximum(jnp.arange(-1, 2), 0),
    "of a number": lambda x: x * nn.relu(2.0),
    "jit": jax.jit(lambda x: nn.relu(x) @ jnp.eye(x.shape[-1])),
    "checkpoint": jax.checkpoint(lambda x: nn.relu(x) @ jnp.eye(x.shape[-1])),
    "loop": lambda x: lax.scan(lambda y, _: (nn.relu(y) - 0.1, None), x, None, 3)[0],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_relus_and_their_gradients_are_the_same(name, dtype, monkeypatch):
    monkeypatch.setattr(relus, "_FEWEST_KEPT", 0)
    numbers = np.array([np.nan, 0.0, -0.0, np.inf, -np.inf, 6.0, 7.0, -1.0, 1e-40, 0.5])
    inputs = jnp.array(np.concatenate([numbers, RNG.normal(size=80) * 4]).reshape(3, 10, 3), dtype)
    function = FUNCTIONS[name]
    weights = jnp.eye(3, dtype=dtype)

    def both(_, x):
        result, vjp = jax.vjp(lambda x: function(function(x) @ weights) @ weights, x)
        return result, vjp(jnp.ones_like(result))

    given, expected = (f(None, inputs) for f in (cpu.Compiled(both), jax.jit(both)))
    for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(*(np.asarray(a, "float32") for a in (one, other)))


@pytest.mark.parametrize(
    ("function", "is_replaced"),
    [
        (nn.relu, True),
        (lambda x: jnp.maximum(0.0, x), True),
        (lambda x: jnp.maximum(x, 1.0), False),
        (lambda x: jnp.maximum(x, x[::-1]), False),
        (lambda x: jnp.maximum(x.astype(int), 0), False),
    ],
)
def test_maximum_with_zero_reads_two_arrays(function, is_replaced):
    text = given_to_xla(cpu.Compiled(lambda _, x: function(x)), jnp.ones(4))
    assert (" clamp " in text) == is_replaced


def compared_by(function):
    """Return what the first comparison of a function reads: a variable's place, or its bound."""
    jaxpr = jaxprs._comparing_outputs(jax.make_jaxpr(function)(jnp.ones(3)).jaxpr)
    return next(e.invars[0] for e in jaxpr.eqns if e.primitive.name in ("gt", "lt")), jaxpr


@pytest.mark.parametrize(
    ("function", "reads_output"),
    [
        (lambda x: (nn.relu(x), x > 0), True),
        (lambda x: (nn.relu6(x), x > 0), True),
        (lambda x: (nn.relu6(x), x < 6), True),
        (lambda x: (nn.relu6(x), x < 3), False),
        (lambda x: (nn.relu(x), x > 1), False),
        (lambda x: (nn.relu(x), x < 0), False),
        (lambda x: (nn.gelu(x), x > 0), False),
        (lambda x: (x > 0, nn.relu(x)), False),
    ],
)
def test_comparisons_with_the_bounds_of_a_relu_read_its_output(function, reads_output):
    compared, jaxpr = compared_by(function)
    assert (compared is not jaxpr.invars[0]) == reads_output


def kept_by(function, *arrays):
    """Return the shapes of the masks that are kept."""
    keep = mock.Mock(side_effect=lambda mask: mask)
    jaxpr = jax.make_jaxpr(function)(*arrays)
    jaxprs.substitute(jaxpr, {}, arrays, {}, keep)
    return [call.args[0].shape for call in keep.call_args_list]


def test_masks_are_kept_until_after_a_product():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 3))

    def twice(function):
        return lambda x: jax.vjp(lambda x: function(function(x) @ w), x)[1](x)

    assert kept_by(twice(nn.relu), x) == [(2, 3)]
    assert kept_by(twice(jax.jit(nn.leaky_relu)), x) == [(2, 3)]
    inside = jax.jit(lambda x: nn.relu(nn.relu(x) @ w) @ w)
    assert kept_by(lambda x: jax.vjp(inside, x)[1](x), x) == [(2, 3), (2, 3)]
    assert kept_by(lambda x: nn.leaky_relu(nn.leaky_relu(x) @ w), x) == []
    assert kept_by(lambda x: jax.vjp(lambda x: nn.relu(x + 1), x)[1](x), x) == []


def test_masks_are_kept_until_after_a_convolution():
    module, x = nn.Conv(4, (3, 3)), jnp.ones((2, 8, 8, 4))
    parameters = module.init(jax.random.key(0), x)

    def gradient(x):
        return jax.vjp(lambda x: module.apply(parameters, nn.relu(x)), x)[1](x)

    assert kept_by(gradient, x) == [(2, 8, 8, 4)]


class Blocks(nn.Module):
    """A residual network: all sums are needed by the next block, and by the one after it."""

    depth: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = nn.relu(x + nn.Conv(16, (3, 3))(x))
        return x.mean((1, 2))


def memory_of(function, depth):
    """Return the bytes that a function needs beside its arguments and results."""
    module, x = Blocks(depth), jnp.ones((4, 64, 64, 16))
    parameters = module.init(jax.random.key(0), x)

    def applied(parameters, x):
        return function(lambda x: module.apply(parameters, x), x)

    compiled = cpu.Compiled(applied)
    memory = traced(compiled, x, parameters=parameters).lower().compile().memory_analysis()
    return memory.temp_size_in_bytes, x.nbytes


def test_memory_does_not_grow_with_the_blocks_of_a_residual_network():
    few, size = memory_of(lambda f, x: f(x), 3)
    many, _ = memory_of(lambda f, x: f(x), 9)
    assert few >= size
    assert many == few


def test_a_gradient_keeps_a_bit_for_each_relu():
    def gradient(function, x):
        result, vjp = jax.vjp(function, x)
        return vjp(jnp.ones_like(result))

    few, size = memory_of(gradient, 3)
    many, _ = memory_of(gradient, 9)
    assert few >= size
    assert many - few <= 6 * size / 32 * 1.1


def test_a_gradient_is_the_same_where_jax_promotes_no_types_and_no_ranks():
    module = nn.Sequential([nn.Conv(16, (3, 3)), nn.relu, nn.Conv(16, (3, 3))])
    images = jnp.array(RNG.normal(size=(2, 64, 64, 3)), "float32")
    params = module.init(jax.random.key(0), images)

    def gradient(params, x):
        return jax.grad(lambda y: (module.apply(params, y) ** 2).sum())(x)

    expected = cpu.Compiled(gradient)(params, images)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        given = cpu.Compiled(gradient)(params, images)
    np.testing.assert_array_equal(given, expected)
