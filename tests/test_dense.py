"""Small networks of dense layers, which are operations of TensorFlow in its graphs."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from xplique.attributions import Occlusion, Saliency

from tests.compilations import compilations
from xplique_flax import FlaxWrapper
from xplique_flax.dense import dense_network
from xplique_flax.samples import PROBE, traced_batch

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(7, 6)).astype("float32")
# At zero and at six ReLUs have no derivative; equal numbers have no greatest one.
CORNERS = np.array([[0, 6, 0, 6, -1, 7], [0] * 6, [6] * 6, [100] * 6, [-100] * 6], "float32")


def with_offsets(module):
    """Draw parameters, with the averages of batches and the offsets too."""
    variables = module.init(jax.random.key(0), INPUTS)
    return jax.tree.map(lambda a: (a + RNG.uniform(0.1, 0.5, a.shape)).astype("float32"), variables)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(6)(x)))
        return x + nn.Dense(6)(nn.Dropout(0.5, deterministic=True)(x))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(6)
        return layer(jnp.tanh(layer(x)))


class Standardized(nn.Module):
    """A constant, and one that has the size of the batch."""

    @nn.compact
    def __call__(self, x):
        x = (x - np.arange(6, dtype="float32")) / jnp.full((len(x), 1), 3.0)
        return nn.Dense(3)(x.reshape(len(x), 2, 3).reshape(len(x), -1))


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm()(x))


def activated(function):
    class Activated(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(function(x))

    return Activated()


ACTIVATIONS = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "maximum": lambda x: jnp.maximum(0, x),
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "selu": nn.selu,
    "silu": nn.silu,
    "gelu": nn.gelu,
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "softmax": nn.softmax,
    "square": lambda x: x**2,
}
MODULES = {name: activated(function) for name, function in ACTIVATIONS.items()} | {
    "residual": Residual(),
    "twice": Twice(),
    "standardized": Standardized(),
    "normalized": Normalized(),
    "recomputed": nn.remat(Residual)(),
}


def network(module, variables, sample=(6,)):
    leaves, structure = jax.tree.flatten(variables)

    def function(leaves, x):
        return module.apply(jax.tree.unflatten(structure, leaves), x)

    return dense_network(partial(traced_batch, function, leaves, sample))


def in_a_graph(wrapped):
    """Return a graph of the outputs, and of the gradient of their weighted sum."""

    @tf.function
    def both(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = wrapped(x)
            score = tf.reduce_sum(outputs * tf.range(1.0, outputs.shape[1] + 1))
        return outputs, tape.gradient(score, x)

    return both


def calls_python(function):
    graph = function.get_concrete_function(tf.TensorSpec((None, 6))).graph
    return any("PyFunc" in operation.type for operation in graph.get_operations())


def by_jax(module, variables, x):
    def score(x):
        outputs = module.apply(variables, x)
        return (outputs * jnp.arange(1.0, outputs.shape[1] + 1)).sum()

    return module.apply(variables, x), jax.grad(score)(x)


@pytest.mark.parametrize("shape", [None, (6,)])
@pytest.mark.parametrize("name", MODULES)
def test_equal_to_jax(name, shape):
    module, variables = MODULES[name], with_offsets(MODULES[name])
    both = in_a_graph(FlaxWrapper(module, variables, input_shape=shape))
    assert not calls_python(both)
    for inputs in (INPUTS, CORNERS, INPUTS[:1], np.full((1, 6), np.nan, "float32")):
        outputs, gradient = both(tf.constant(inputs))
        expected_outputs, expected_gradient = by_jax(module, variables, inputs)
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        np.testing.assert_allclose(outputs, expected_outputs, **tolerance)
        if not np.isnan(inputs).any():
            np.testing.assert_allclose(gradient, expected_gradient, **tolerance)
    outputs, gradient = both(tf.zeros((0, 6)))
    assert outputs.shape[0] == 0
    assert gradient.shape == (0, 6)


@pytest.mark.parametrize("shape", [None, (6,)])
def test_nothing_is_compiled(shape):
    variables = with_offsets(Residual())
    with compilations() as seconds:
        wrapped = FlaxWrapper(Residual(), variables, input_shape=shape)
        Saliency(wrapped)(INPUTS, np.eye(6)[[0] * 7])
        Occlusion(wrapped, patch_size=1, patch_stride=1)(INPUTS, np.eye(6)[[0] * 7])
        assert seconds == []
        wrapped(INPUTS)  # outside of a graph it is JAX that computes
        assert seconds != []


def test_graphs_read_the_parameters_of_now():
    variables = with_offsets(Residual())
    wrapped = FlaxWrapper(Residual(), variables, input_shape=(6,))
    both = in_a_graph(wrapped)
    both(tf.constant(INPUTS))
    wrapped.set_weights([2 * weight for weight in wrapped.get_weights()])
    outputs, _ = both(tf.constant(INPUTS))
    doubled = jax.tree.map(lambda array: 2 * array, variables)
    np.testing.assert_allclose(outputs, Residual().apply(doubled, INPUTS), rtol=1e-5, atol=1e-5)


def test_gradient_of_a_gradient():
    module = activated(jnp.tanh)
    variables = with_offsets(module)
    wrapped = FlaxWrapper(module, variables)

    @tf.function
    def second(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                score = tf.reduce_sum(wrapped(x)[:, 0])
            first = inner.gradient(score, x)
            squares = tf.reduce_sum(first**2)
        return outer.gradient(squares, x)

    gradient = jax.grad(lambda x: module.apply(variables, x)[:, 0].sum())
    expected = jax.grad(lambda x: (gradient(x) ** 2).sum())(INPUTS)
    np.testing.assert_allclose(second(tf.constant(INPUTS)), expected, rtol=1e-4, atol=1e-6)


@jax.custom_jvp
def opposite(x):
    return x


opposite.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))


KEY = jax.random.key(0)
LEFT_TO_JAX = {
    "a gradient of the user's own": activated(opposite),
    "a ReLU of the user's own gradient": activated(lambda x: jax.nn.relu(opposite(x))),
    "half precision": nn.Dense(3, dtype="bfloat16"),
    "a precision that was asked for": nn.Dense(3, precision="highest"),
    "samples that depend on each other": activated(lambda x: x - x.mean(0)),
    "products of samples": activated(lambda x: (x @ x.T) @ x),
    "the place of a sample": activated(lambda x: x + jnp.arange(len(x))[:, None]),
    "the number of samples": activated(lambda x: x * len(x)),
    "one more than that": activated(lambda x: x / (len(x) + 1)),
    "columns for each sample": activated(lambda x: (x @ jnp.ones((6, 2 * len(x)))).sum(1)[:, None]),
    "random numbers": activated(lambda x: x * jax.random.normal(KEY, x.shape)),
    "a callback": activated(lambda x: (jax.debug.callback(lambda _: None, x), x)[1]),
    "no gradient": lambda x: (x > 0).astype("float32"),
    "a stopped gradient": lambda x: jax.lax.stop_gradient(x),
    "a minimum": activated(lambda x: jnp.minimum(x, 1)),
    "a maximum of two": activated(lambda x: jnp.maximum(x, x**2)),
    "many parameters": nn.Dense(2**17),
    "as many features as the batch that is traced": nn.Dense(PROBE, use_bias=False),
}


class Function(nn.Module):
    function: object

    def __call__(self, x):
        return self.function(x)


@pytest.mark.parametrize("why", LEFT_TO_JAX)
def test_left_to_jax(why):
    module = LEFT_TO_JAX[why]
    module = module if isinstance(module, nn.Module) else Function(module)
    variables = module.init(jax.random.key(0), INPUTS)
    assert network(module, variables) is None


def test_one_parameter_less_is_few_enough():
    rows = 2**17 // 8
    for features, is_dense in ((7, True), (8, False)):
        module = nn.Dense(features)  # of 2**14 columns, and an offset for each feature
        variables = module.init(jax.random.key(0), np.zeros((1, rows), "float32"))
        assert (network(module, variables, (rows,)) is not None) == is_dense


def test_spread_batches_are_left_to_jax():
    variables = with_offsets(Residual())
    wrapped = FlaxWrapper(Residual(), variables, input_shape=(6,), devices=jax.devices())
    both = in_a_graph(wrapped)
    assert calls_python(both)
    expected = by_jax(Residual(), variables, INPUTS)
    for given, right in zip(both(tf.constant(INPUTS)), expected, strict=True):
        np.testing.assert_allclose(given, right, rtol=1e-5, atol=1e-5)


def test_samples_of_unknown_shape_are_left_to_jax():
    variables = with_offsets(Residual())
    wrapped = FlaxWrapper(Residual(), variables, input_shape=(6,))
    function = tf.function(wrapped, input_signature=[tf.TensorSpec(None)])
    outputs = function(tf.constant(INPUTS))
    np.testing.assert_allclose(outputs, Residual().apply(variables, INPUTS), rtol=1e-5, atol=1e-5)
