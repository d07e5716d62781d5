"""Half precision: the model computes in it, and explanations are float32 and close to exact."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from flax import nnx
from xplique.attributions import (
    DeconvNet,
    GradCAM,
    GuidedBackprop,
    IntegratedGradients,
    Occlusion,
    Saliency,
)

from tests.architectures import digits
from tests.equality_table import largest_difference
from xplique_flax import FlaxWrapper

IMAGES, TARGETS = digits(6)
SHAPE = IMAGES.shape[1:]
HALVES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}
METHODS = {
    "Saliency": Saliency,
    "IntegratedGradients": lambda model: IntegratedGradients(model, steps=8),
    "GuidedBackprop": GuidedBackprop,
    "DeconvNet": DeconvNet,
    "GradCAM": GradCAM,
    "Occlusion": lambda model: Occlusion(model, patch_size=2, patch_stride=2),
}


class Net(nn.Module):
    """It computes in one precision, with parameters in another."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.relu(nn.Conv(8, (3, 3), **options, name="conv")(x))
        x = nn.relu(nn.Dense(16, **options, name="hidden")(x.reshape((len(x), -1))))
        return nn.Dense(10, **options, name="last")(x)


class NNXNet(nnx.Module):
    def __init__(self, dtype, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.hidden = nnx.Linear(512, 16, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.last = nnx.Linear(16, 10, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x)).reshape((len(x), -1))
        return self.last(nnx.relu(self.hidden(x)))


@pytest.fixture(scope="module")
def parameters():
    return Net().init(jax.random.key(0), IMAGES)


def in_half(parameters, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), parameters)


@pytest.fixture(params=["computation", "parameters too", "nnx"])
def kind(request):
    return request.param


@pytest.fixture(params=HALVES)
def half(request, kind, parameters):
    """The wrapped model, and the same as a function of JAX."""
    dtype = HALVES[request.param]
    if kind == "nnx":
        net = NNXNet(dtype, nnx.Rngs(0))
        for name, arrays in parameters["params"].items():
            for part, array in arrays.items():
                getattr(getattr(net, name), part)[...] = array.astype(dtype)
        definition, state = nnx.split(net)
        state = jax.tree.map(lambda leaf: leaf, state)
        apply = partial(lambda state, x: nnx.merge(definition, state)(x), state)
        return FlaxWrapper(net, input_shape=SHAPE), apply
    if kind == "computation":
        module, arrays = Net(dtype), parameters
    else:
        module, arrays = Net(dtype, dtype), in_half(parameters, dtype)
    return FlaxWrapper(module, arrays, input_shape=SHAPE), partial(module.apply, arrays)


def test_outputs_and_gradients_are_those_of_the_compiled_module(half):
    wrapped, apply = half
    assert apply(IMAGES).dtype != jnp.float32
    outputs = wrapped(IMAGES)
    assert outputs.dtype == tf.float32
    # XLA may leave out the rounding before a cast, so the whole has to be the same function.
    expected = jax.jit(lambda arrays, x: apply.func(arrays, x).astype(jnp.float32))
    np.testing.assert_array_equal(outputs, expected(*apply.args, IMAGES))

    def score(x):
        return (apply(x).astype(jnp.float32) * TARGETS).sum()

    expected = abs(jax.jit(jax.grad(score))(IMAGES)).astype(jnp.float32)
    assert largest_difference(Saliency(wrapped)(IMAGES, TARGETS), expected) < 1e-5


def test_parameters_keep_their_precision(half, kind):
    wrapped, apply = half
    wanted = "float32" if kind == "computation" else str(apply(IMAGES).dtype)
    assert {weight.dtype for weight in wrapped.weights} == {wanted}


@pytest.mark.parametrize("method", METHODS)
def test_explanations_are_close_to_those_in_float32(half, method, parameters):
    wrapped, apply = half
    exact = FlaxWrapper(Net(), parameters, input_shape=SHAPE)
    maps = METHODS[method](wrapped)(IMAGES, TARGETS)
    assert maps.dtype == tf.float32
    expected = METHODS[method](exact)(IMAGES, TARGETS)
    epsilon = float(jnp.finfo(apply(IMAGES).dtype).eps)
    difference = np.linalg.norm(maps - expected) / np.linalg.norm(expected)
    assert 0 < difference < 8 * epsilon


def test_layers_and_parts_compute_as_the_whole(half):
    """Between layers are float32 tensors, which hold half precision exactly."""
    wrapped, apply = half
    eager = np.asarray(apply(IMAGES).astype(jnp.float32))
    epsilon = float(jnp.finfo(apply(IMAGES).dtype).eps)
    features, head = wrapped.split("conv")
    chain = tf.keras.Model(wrapped.input, wrapped.output)
    for outputs in (chain(IMAGES), head(features(IMAGES))):
        assert largest_difference(outputs, eager) < 4 * epsilon
