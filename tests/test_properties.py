"""Random architectures and inputs: what holds for every model, held against JAX and Flax alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.equality_table import largest_difference
from xplique_flax import FlaxWrapper

SHAPE = (6, 6, 2)


class Unit(nn.Module):
    """One part of a random network, which keeps height and width."""

    kind: str
    features: int

    @nn.compact
    def __call__(self, x):
        if self.kind == "convolution":
            return nn.relu(nn.Conv(self.features, (3, 3))(x))
        if self.kind == "normalized":
            x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
            return nn.gelu(nn.BatchNorm(use_running_average=True)(x))
        if self.kind == "residual":
            return nn.relu(x + nn.Conv(x.shape[-1], (1, 1))(nn.relu(nn.Conv(3, (3, 3))(x))))
        if self.kind == "twice":
            again = nn.Conv(x.shape[-1], (3, 3))
            return again(nn.tanh(again(x)))
        if self.kind == "gated":
            return x * nn.sigmoid(nn.Dense(x.shape[-1])(x.mean((1, 2), keepdims=True)))
        return jnp.concatenate([x, nn.avg_pool(x, (3, 3), padding="SAME")], -1)


class Network(nn.Module):
    kinds: tuple[str, ...]
    features: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        for index, kind in enumerate(self.kinds):
            x = Unit(kind, self.features, name=f"unit_{index}")(x)
        return nn.Dense(self.outputs, name="last")(x.mean((1, 2)))


class NNXUnit(nnx.Module):
    """The same for NNX; a stack of two is scanned over."""

    def __init__(self, kind, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def stack(rngs):
            return nnx.Conv(2, 2, (3, 3), rngs=rngs)

        self.kind = kind
        self.layer = stack(rngs) if kind == "stacked" else nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x):
        if self.kind == "stacked":

            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def forward(x, layer):
                return nnx.relu(layer(x))

            return forward(x, self.layer)
        if self.kind == "twice":
            return self.layer(nnx.tanh(self.layer(x)))
        return x + nnx.relu(self.norm(self.layer(x)))


class NNXNetwork(nnx.Module):
    def __init__(self, kinds, rngs):
        self.units = nnx.List([NNXUnit(kind, rngs) for kind in kinds])
        self.last = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
        for unit in self.units:
            x = unit(x)
        return self.last(x.mean((1, 2)))


NNX_KINDS = st.lists(st.sampled_from(["stacked", "twice", "normalized"]), min_size=1, max_size=3)
KINDS = st.sampled_from(["convolution", "normalized", "residual", "twice", "gated", "joined"])
NETWORKS = st.builds(
    Network,
    kinds=st.lists(KINDS, min_size=1, max_size=3).map(tuple),
    features=st.integers(1, 4),
    outputs=st.integers(1, 4),
)


def same(ours, reference):
    assert largest_difference(ours, reference) <= 1e-4


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
@given(kinds=NNX_KINDS, batch=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_nnx_gradients_layers_and_parts_are_those_of_the_module(kinds, batch, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(batch, *SHAPE)).astype("float32")
    network = NNXNetwork(kinds, nnx.Rngs(seed))
    wrapped = FlaxWrapper(network, input_shape=SHAPE)
    network.eval()
    definition, state = nnx.split(network)

    def apply(x):
        return nnx.merge(definition, jax.tree.map(lambda leaf: leaf, state))(x)

    same(wrapped(inputs), apply(inputs))
    weights = rng.normal(size=(batch, 3)).astype("float32")
    with tf.GradientTape() as tape:
        tensor = tf.constant(inputs)
        tape.watch(tensor)
        score = tf.reduce_sum(wrapped(tensor) * weights)
    same(tape.gradient(score, tensor), jax.grad(lambda x: (apply(x) * weights).sum())(inputs))

    activations = inputs
    for index, unit in enumerate(network.units):
        activations = unit(activations)
        name = f"units.{index}"
        found = tf.keras.Model(wrapped.input, wrapped.get_layer(name).output)(inputs)
        same(found, activations)
        features, head = wrapped.split(name)
        same(features(inputs), activations)
        same(head(features(inputs)), apply(inputs))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
@given(module=NETWORKS, batch=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_gradients_layers_and_parts_are_those_of_the_module(module, batch, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(batch, *SHAPE)).astype("float32")
    variables = module.init(jax.random.key(seed), inputs)
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * rng.random(leaf.shape, "float32"), variables)
    wrapped = FlaxWrapper(module, variables, input_shape=SHAPE)

    def apply(x, **options):
        return module.apply(variables, x, **options)

    outputs, captured = apply(inputs, capture_intermediates=True)
    same(wrapped(inputs), outputs)

    weights = rng.normal(size=outputs.shape).astype("float32")
    with tf.GradientTape() as tape:
        tensor = tf.constant(inputs)
        tape.watch(tensor)
        score = tf.reduce_sum(wrapped(tensor) * weights)
    same(tape.gradient(score, tensor), jax.grad(lambda x: (apply(x) * weights).sum())(inputs))

    names = [f"unit_{index}" for index in range(len(module.kinds))]
    layers = {name: wrapped.get_layer(name).output for name in names}
    found = tf.keras.Model(wrapped.input, layers)(inputs)
    for name in names:
        (expected,) = captured["intermediates"][name]["__call__"]
        same(found[name], expected)
        features, head = wrapped.split(name)
        same(features(inputs), expected)
        same(head(features(inputs)), outputs)
