"""What gradients compute again is the same, and takes less memory than to keep it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_cpu import traced
from xplique_flax import FlaxWrapper, cpu, recomputed

RNG = np.random.default_rng(0)
IMAGES = jnp.array(RNG.normal(size=(4, 48, 48, 3)), "float32")


class Net(nn.Module):
    activation: object

    @nn.compact
    def __call__(self, x):
        for _ in range(6):
            x = self.activation(nn.BatchNorm(use_running_average=True)(nn.Conv(32, (3, 3))(x)))
        return nn.Dense(10)(x.mean((1, 2)))


def gated(x):
    """Weigh channels as EfficientNet does, by what all places hold."""
    x = nn.silu(x)
    return x * nn.sigmoid(x.mean((1, 2), keepdims=True) * 3)


def doubly(x):
    """Use a whole array of one family in another."""
    return nn.silu(x) + jnp.tanh(x[..., ::-1] + nn.softplus(x))


SMOOTH = {
    **{f.__name__: f for f in (nn.silu, nn.gelu, nn.elu, nn.selu, nn.softplus, gated, doubly)},
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "in a call": jax.jit(lambda x: nn.silu(x) + 1),
    "spread": lambda x: nn.silu(x + jnp.broadcast_to(jnp.arange(32.0), x.shape)),
}


def gradient_of(net):
    def gradient(parameters, inputs, cotangents):
        _, vjp = jax.vjp(lambda x: net.apply(parameters, x), inputs)
        return vjp(cotangents)[0]

    return gradient


def compiled_gradients(activation):
    """Return a gradient that keeps all, one that computes again, and what to call them with."""
    net = Net(activation)
    parameters = net.init(jax.random.key(0), IMAGES)
    cotangents = jnp.array(RNG.normal(size=(4, 10)), "float32")
    keeping = cpu.Compiled(gradient_of(net))
    recomputing = cpu.Compiled(gradient_of(net), cotangents=1)
    return keeping, recomputing, (parameters, IMAGES, cotangents)


def memory_of(compiled, parameters, *arrays):
    """Return how many bytes XLA needs beside arguments and results."""
    executable = traced(compiled, *arrays, parameters=parameters).lower().compile()
    return executable.memory_analysis().temp_size_in_bytes


def found_in(activation):
    """Return the equations of a gradient, and what is found in them."""
    net = Net(activation)
    parameters = net.init(jax.random.key(0), IMAGES)
    jaxpr = jax.make_jaxpr(gradient_of(net))(parameters, IMAGES, jnp.ones((4, 10))).jaxpr
    return jaxpr.eqns, recomputed.recomputed(jaxpr, 1)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_is_the_same(name):
    _, recomputing, arguments = compiled_gradients(SMOOTH[name])
    expected = np.asarray(jax.jit(gradient_of(Net(SMOOTH[name])))(*arguments))
    scale = abs(expected).max()
    np.testing.assert_allclose(recomputing(*arguments) / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("name", ["silu", "gelu", "softplus", "mish", "gated", "in a call"])
def test_gradient_takes_less_memory(name):
    keeping, recomputing, arguments = compiled_gradients(SMOOTH[name])
    assert memory_of(recomputing, *arguments) < 0.8 * memory_of(keeping, *arguments)


@pytest.mark.parametrize("activation", [nn.relu, nn.tanh, nn.sigmoid, nn.leaky_relu, nn.softmax])
def test_what_is_kept_as_one_array_is_not_computed_again(activation):
    assert not found_in(activation)[1].makers


@pytest.mark.parametrize(
    ("activation", "operation"),
    [
        (nn.silu, "conv_general_dilated"),
        (SMOOTH["spread"], "conv_general_dilated"),
        (lambda x: nn.silu(x + x[:, ::-1]), "add"),  # of two arrays
    ],
)
def test_each_family_is_kept_as_the_array_that_it_is_computed_from(activation, operation):
    equations, found = found_in(activation)
    kept = {variable for variable, maker in found.makers.items() if maker is None}
    assert len(kept) == 6
    makers = [eqn.primitive.name for eqn in equations if not kept.isdisjoint(eqn.outvars)]
    assert makers == [operation] * 6


def test_gradients_themselves_are_not_computed_again():
    equations, found = found_in(nn.silu)
    for number in found.readers:
        assert found.makers.keys().isdisjoint(equations[number].outvars)


def test_what_is_small_is_not_computed_again(monkeypatch):
    monkeypatch.setattr(recomputed, "_FEWEST_NUMBERS", 4 * 48 * 48 * 32 + 1)
    assert not found_in(nn.silu)[1].makers
    monkeypatch.setattr(recomputed, "_FEWEST_NUMBERS", 4 * 48 * 48 * 32)
    assert found_in(nn.silu)[1].makers


def test_wrapper_computes_again():
    net = Net(nn.silu)
    parameters = net.init(jax.random.key(0), IMAGES)
    pullback = FlaxWrapper(net, parameters)._fused.compiled.pullback
    arrays = IMAGES, jnp.ones((4, 10))
    pullback([*jax.tree.leaves(parameters)], *arrays)
    keeping = cpu.Compiled(gradient_of(net))
    assert memory_of(pullback.jitted, jax.tree.leaves(parameters), *arrays) < 0.8 * memory_of(
        keeping, parameters, *arrays
    )
