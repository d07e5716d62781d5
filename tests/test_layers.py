"""The layers that a Flax model is cut into: names, graph, weights, what they compute."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits, load_wine
from xplique.attributions import FEM, DeconvNet, GradCAM, GradientInput, GuidedBackprop, Saliency
from xplique.commons.model_override import override_relu_gradient

from tests.compilations import compilations
from xplique_flax import FlaxWrapper
from xplique_flax.bridge import Bridge
from xplique_flax.graph import Value
from xplique_flax.layers import FlaxLayer, ReLU

DIGITS = (load_digits().images[:4, ..., None] / 16).astype("float32")
TARGETS = np.eye(10, dtype="float32")[load_digits().target[:4]]
WINE = (load_wine().data[:4] / load_wine().data.max(0)).astype("float32")
SMALL = nn.initializers.normal(0.3)


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (3, 3), bias_init=SMALL)(x)
        y = nn.BatchNorm(use_running_average=True, scale_init=SMALL, bias_init=SMALL)(y)
        y = nn.relu(y)
        y = nn.Conv(self.features, (3, 3), bias_init=SMALL)(y)
        return nn.relu(x + y)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, name="stem", bias_init=SMALL)(x))
        x = Block(6)(x)
        return nn.softmax(nn.Dense(10)(x.mean((1, 2))))


def wrap(module, inputs, **kwargs):
    parameters = module.init(jax.random.key(0), inputs)
    return FlaxWrapper(module, parameters, input_shape=inputs.shape[1:], **kwargs), parameters


def names(model):
    return [layer.name for layer in model.layers]


def largest_difference(given, expected):
    given, expected = np.asarray(given), np.asarray(expected)
    assert np.abs(expected).max() > 0
    return np.abs(given - expected).max() / np.abs(expected).max()


class Pooled(nn.Module):
    """A maximum, whose gradient reads its input, and linear parts, whose gradients do not."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(6, (3, 3), name="stem")(x)), (2, 2), (2, 2))
        return nn.Dense(10)(Block(6)(x).mean((1, 2)))


class Spectrum(nn.Module):
    """Complex numbers, multiplied by others."""

    @nn.compact
    def __call__(self, x):
        turns = self.param("turns", SMALL, (2, 8, 5))
        return jnp.fft.rfft2(x[..., 0]) * jax.lax.complex(*turns)


class Fourier(nn.Module):
    """Complex numbers go past a ReLU."""

    @nn.compact
    def __call__(self, x):
        spectrum = Spectrum()(x)
        y = nn.relu(nn.Conv(6, (3, 3), bias_init=SMALL)(x)).mean(-1)
        mixed = jnp.fft.irfft2(spectrum * jnp.conj(jnp.fft.rfft2(y)))
        mixed = nn.relu(mixed - mixed.mean((1, 2), keepdims=True))
        return nn.Dense(10)(mixed.reshape(len(x), -1))


class TwoRows(nn.Module):
    """Two rows for each sample."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8)(x.reshape(2 * len(x), -1)))
        return nn.Dense(5)(x).reshape(len(x) // 2, 10)


def with_changed_relus(module, parameters, rule):
    """The gradient where that of ``relu(x)`` is ``rule(x, g)`` of the gradient g, in JAX alone."""

    @jax.custom_vjp
    def relu(x):
        return jnp.maximum(x, 0)

    relu.defvjp(lambda x: (relu(x), x), lambda x, g: (rule(x, jnp.maximum(g, 0)),))
    original, nn.relu = nn.relu, relu
    try:
        return jax.grad(lambda x: (module.apply(parameters, x) * TARGETS).sum())(DIGITS)
    finally:
        nn.relu = original


def users_policy(is_guided):
    """A policy for ReLUs as Xplique has them, but not one of its own."""

    def policy(max_value=None, threshold=0.0):
        @tf.custom_gradient
        def relu(x):
            gate = tf.cast(x > 0, tf.float32) if is_guided else 1
            return tf.nn.relu(x), lambda g: tf.nn.relu(g) * gate

        return relu

    return policy


def chain(model):
    """The same model, through its layers one by one."""
    return tf.keras.Model(model.inputs, model.outputs)


@pytest.fixture(scope="module")
def residual():
    return wrap(Residual(), DIGITS)


@pytest.fixture
def calls(monkeypatch):
    """A list that grows by one with each call of JAX."""
    made = []
    original = Bridge.execute
    monkeypatch.setattr(Bridge, "execute", lambda *args: made.append(1) or original(*args))
    return made


class TestNames:
    def test_layers_are_the_modules(self, residual):
        assert names(residual[0])[:-3] == [
            "inputs",
            "stem",
            "relu",
            "Block_0.Conv_0",
            "Block_0.BatchNorm_0",
            "Block_0.relu",
            "Block_0.Conv_1",
            "Block_0.add",
            "Block_0.relu_1",
            "Block_0",
        ]
        assert "Dense_0" in names(residual[0])

    def test_relus_and_filters(self, residual):
        relus = [layer for layer in residual[0].layers if isinstance(layer, tf.keras.layers.ReLU)]
        assert [layer.name for layer in relus] == ["relu", "Block_0.relu", "Block_0.relu_1"]
        with_filters = {
            layer.name: layer.filters for layer in residual[0].layers if hasattr(layer, "filters")
        }
        assert with_filters == {"stem": 6, "Block_0.Conv_0": 6, "Block_0.Conv_1": 6}

    def test_residual_connection_is_kept(self, residual):
        model = residual[0]
        origins = {
            tensor._keras_history.operation.name for tensor in model.get_layer("Block_0.add").input
        }
        assert origins == {"relu", "Block_0.Conv_1"}

    def test_names_that_tensorflow_does_not_admit(self):
        class Odd(nn.Module):
            @nn.compact
            def __call__(self, x):
                for name in ("_a", "b c", "é", "d/e"):
                    x = nn.relu(nn.Dense(10, name=name, bias_init=SMALL)(x))
                return x

        model, parameters = wrap(Odd(), WINE)
        assert {"_a", "b c", "é", "d.e", "relu"} <= set(names(model))
        run = tf.function(chain(model))
        assert largest_difference(run(WINE), Odd().apply(parameters, WINE)) < 1e-6
        maps = GuidedBackprop(model)(WINE, np.ones((4, 10)))
        assert np.abs(maps).max() > 0

    def test_names_that_collide(self):
        class Colliding(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.relu(nn.Dense(10, name="relu", bias_init=SMALL)(x))
                return nn.relu(nn.Dense(10, name="inputs")(x))

        model, parameters = wrap(Colliding(), WINE)
        assert {"relu", "relu_1", "inputs", "inputs_1"} <= set(names(model))
        assert isinstance(model.get_layer("relu"), FlaxLayer)
        assert isinstance(model.get_layer("inputs"), FlaxLayer)
        assert largest_difference(chain(model)(WINE), Colliding().apply(parameters, WINE)) < 1e-6


class TestWhatLayersCompute:
    def test_each_is_the_intermediate_of_flax(self, residual):
        model, parameters = residual
        _, state = Residual().apply(parameters, DIGITS, capture_intermediates=True)
        reported = state["intermediates"]
        for path in ("stem", "Block_0", "Block_0.Conv_0", "Block_0.BatchNorm_0", "Block_0.Conv_1"):
            entry = reported
            for part in path.split("."):
                entry = entry[part]
            expected = entry["__call__"][0]
            inside = tf.keras.Model(model.inputs, model.get_layer(path).output)
            assert largest_difference(inside(DIGITS), expected) < 1e-6
            assert largest_difference(model.truncate(path)(DIGITS), expected) < 1e-6

    @pytest.mark.parametrize("cut", ["stem", "relu", "Block_0.add", "Block_0", "Dense_0"])
    def test_cut_and_rejoined(self, residual, cut):
        model, parameters = residual
        between = model.get_layer(cut).output
        front, back = tf.keras.Model(model.inputs, between), tf.keras.Model(between, model.output)
        expected = Residual().apply(parameters, DIGITS)
        assert largest_difference(back(front(tf.constant(DIGITS))), expected) < 1e-6

    @pytest.mark.parametrize("size", [0, 1, 2, 4])
    def test_batch_sizes(self, residual, size):
        model, parameters = residual
        inputs = tf.constant(DIGITS[:size])
        given = chain(model)(inputs)
        assert given.shape == (size, 10)
        if size:
            assert largest_difference(given, Residual().apply(parameters, DIGITS[:size])) < 1e-6

    def test_nan(self, residual):
        assert np.isnan(chain(residual[0])(np.full_like(DIGITS, np.nan))).all()

    def test_watched_layer_is_one_call_of_three_and_then_of_none(self, residual, calls):
        model = residual[0]
        GradCAM(model, conv_layer="Block_0.Conv_0")(DIGITS, TARGETS)
        assert len(calls) == 3  # before it, the layer itself, and the gradient of what follows
        calls.clear()
        model(DIGITS)
        assert len(calls) == 1

    def test_replaced_call_takes_part(self):
        model, parameters = wrap(Residual(), DIGITS)
        model.get_layer("Dense_0").call = lambda inputs, node=0: tf.zeros((len(inputs), 10))
        np.testing.assert_allclose(model(DIGITS), np.full((4, 10), 0.1), rtol=1e-6)
        del model.get_layer("Dense_0").call
        assert largest_difference(model(DIGITS), Residual().apply(parameters, DIGITS)) < 1e-6


class Folded(nn.Module):
    """The batch is folded into another axis, moved to another place, and repeated."""

    @nn.compact
    def __call__(self, x):
        n = len(x)
        x = nn.Dense(5, name="rows", bias_init=SMALL)(x.reshape(n * 8, 8))
        x = nn.relu(x).reshape(n, 8, 5)
        x = nn.Dense(4, name="moved", bias_init=SMALL)(jnp.transpose(x, (1, 0, 2)))
        token = jnp.tile(self.param("token", SMALL, (1, 1, 4)), (1, n, 1))
        x = jnp.concatenate([token, nn.relu(x)], axis=0)
        places = nn.Embed(9, 4, name="places")(jnp.arange(9))
        return nn.Dense(10)(jnp.transpose(x + places[:, None], (1, 0, 2)).reshape(n, -1))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_batch_that_is_folded_into_other_axes(size):
    rows = DIGITS[..., 0]
    model, parameters = wrap(Folded(), rows)
    assert model.get_layer("rows").output.shape == (None, 5)
    assert model.get_layer("moved").output.shape == (8, None, 4)
    expected = Folded().apply(parameters, rows[:size])
    assert largest_difference(chain(model)(rows[:size]), expected) < 1e-6
    gradient = jax.grad(lambda x: (Folded().apply(parameters, x) * TARGETS[:size]).sum())
    maps = Saliency(chain(model))(rows[:size], TARGETS[:size])
    assert largest_difference(maps, np.abs(gradient(rows[:size]))) < 1e-5


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        twice = nn.Dense(13, name="twice", bias_init=SMALL)
        return nn.Dense(10)(nn.relu(twice(nn.relu(twice(x)))))


def test_shared_module_is_one_layer_with_two_nodes():
    model, parameters = wrap(Shared(), WINE)
    assert names(model).count("twice") == 1
    assert len(model.get_layer("twice")._inbound_nodes) == 2
    expected = Shared().apply(parameters, WINE)
    assert largest_difference(chain(model)(WINE), expected) < 1e-6
    inputs = tf.keras.Input((13,))
    twice = tf.keras.layers.Dense(13)
    hidden = tf.keras.layers.ReLU()(twice(tf.keras.layers.ReLU()(twice(inputs))))
    twin = tf.keras.Model(inputs, tf.keras.layers.Dense(10)(hidden))
    twin.set_weights(model.get_weights())
    targets = np.eye(10, dtype="float32")[:4]
    maps = [GuidedBackprop(m)(WINE, targets) for m in (model, twin)]
    assert largest_difference(*maps) < 1e-5


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(10, 13, name="embed")
        scale = self.param("scale", SMALL, (13,))
        x = nn.relu(nn.Dense(13)(x) * scale)
        x = nn.Dense(13)(x) * scale + embed(jnp.array(3))
        return embed.attend(x)


def test_parameters_that_several_layers_use():
    model, parameters = wrap(Tied(), WINE)
    expected = Tied().apply(parameters, WINE)
    assert largest_difference(chain(model)(WINE), expected) < 1e-6
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert model.count_params() == count
    assert sum(weight.size for weight in model.get_weights()) == count
    assert {"scale", "embed.embedding"} <= set(names(model))

    changed = jax.tree.map(lambda leaf: leaf, parameters)
    changed["params"]["scale"] = parameters["params"]["scale"] * 2
    model.get_layer("scale").set_weights([changed["params"]["scale"]])
    expected = Tied().apply(changed, WINE)
    assert largest_difference(model(WINE), expected) < 1e-6
    assert largest_difference(chain(model)(WINE), expected) < 1e-6
    clone = tf.keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert largest_difference(clone(WINE), expected) < 1e-6
    head = tf.keras.Model(model.get_layer("relu").output, model.output)
    front = tf.keras.Model(model.inputs, model.get_layer("relu").output)
    assert largest_difference(head(front(tf.constant(WINE))), expected) < 1e-6


class Several(nn.Module):
    @nn.compact
    def __call__(self, x):
        first, rest = Halves(name="halves")(x, factor=2.0)
        return nn.Dense(10)(jnp.concatenate([rest["low"], first], -1))


class Halves(nn.Module):
    @nn.compact
    def __call__(self, x, factor):
        x = nn.relu(nn.Dense(8, bias_init=SMALL)(x)) * factor
        return x[:, :4], {"low": x[:, 4:], "n": 3}


def test_module_with_several_outputs():
    model, parameters = wrap(Several(), WINE)
    assert [output.shape for output in model.get_layer("halves").output] == [(None, 4), (None, 4)]
    assert largest_difference(chain(model)(WINE), Several().apply(parameters, WINE)) < 1e-6


class Pair(nn.Module):
    @nn.compact
    def __call__(self, a, b):
        p = nn.relu(nn.Dense(5, name="p", bias_init=SMALL)(a)) + nn.Dense(5, name="q")(b)
        return p, nn.Conv(5, (1,), name="aside")(p[:, None])


class Pairs(nn.Module):
    @nn.compact
    def __call__(self, x):
        pair = Pair(name="pair")
        first, _ = pair(nn.relu(nn.Dense(6)(x)), nn.tanh(nn.Dense(6)(x)))
        return nn.Dense(10, name="head")(first)


def test_outputs_that_nothing_needs_are_no_part_of_the_model():
    model, parameters = wrap(Pairs(), WINE)
    assert "pair.aside" not in names(model)
    assert not any(hasattr(layer, "filters") for layer in model.layers[1:])
    assert model.get_layer("pair").output.shape == (None, 5)
    with pytest.raises(ValueError, match="does not depend on"):
        model.get_layer("pair.aside")
    assert largest_difference(chain(model)(WINE), Pairs().apply(parameters, WINE)) < 1e-6
    for name in ("pair.p", "pair.q", "pair"):
        truncated = model.truncate(name)
        inside = tf.keras.Model(model.inputs, model.get_layer(name).output)
        assert largest_difference(truncated(WINE), inside(WINE)) < 1e-6
        assert largest_difference(chain(truncated)(WINE), inside(WINE)) < 1e-6


class Helped(nn.Module):
    def setup(self):
        self.conv = nn.Conv(1, (3, 3), bias_init=SMALL)
        self.norm = nn.GroupNorm(1)

    def normalised(self, x):
        return self.norm(self.conv(x))

    def __call__(self, x):
        return nn.relu(self.normalised(x))


def test_methods_of_a_module_are_part_of_its_call():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(Helped(name="helped")(x).reshape(len(x), -1))

    model, parameters = wrap(Net(), DIGITS)
    assert {"helped", "helped.conv", "helped.norm", "helped.relu"} <= set(names(model))
    _, state = Net().apply(parameters, DIGITS, capture_intermediates=True)
    expected = state["intermediates"]["helped"]["__call__"][0]
    assert largest_difference(model.truncate("helped")(DIGITS), expected) < 1e-6
    assert len(model.get_layer("helped")._inbound_nodes) == 1


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x):
        step = self.variable("state", "step", lambda: jnp.array(3))
        x = nn.Dense(13, name="a")(x) * step.value
        return nn.Dense(10, name="b")(nn.relu(x)) + step.value


def test_counters_are_no_weights():
    model, parameters = wrap(Counting(), WINE)
    assert all(weight.dtype == "float32" for weight in model.get_weights())
    expected = Counting().apply(parameters, WINE)
    assert largest_difference(model(WINE), expected) < 1e-6
    clone = tf.keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert largest_difference(clone(WINE), expected) < 1e-6


def test_depthwise_convolution_has_no_filters_as_in_keras():
    class Depthwise(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 3), name="full")(x)
            x = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)
            return nn.Dense(10)(x.mean((1, 2)))

    model, _ = wrap(Depthwise(), DIGITS)
    assert [layer.name for layer in model.layers if hasattr(layer, "filters")] == ["full"]
    assert not hasattr(tf.keras.layers.DepthwiseConv2D(3), "filters")


def test_shared_parameter_of_a_module_with_a_slash():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", SMALL, (13, 13))
            return nn.relu(x @ w) @ w

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Inner(name="enc/dec")(x)

    model, parameters = wrap(Outer(), WINE)
    assert "enc.dec.w" in names(model)
    assert largest_difference(chain(model)(WINE), Outer().apply(parameters, WINE)) < 1e-6


@pytest.mark.parametrize("name", ["_Private", "Réseau"])
def test_class_names_that_tensorflow_does_not_admit(name):
    module = type(name, (Shared,), {"__annotations__": {}})()
    model, _ = wrap(module, WINE)
    maps = GuidedBackprop(model)(WINE, np.eye(10, dtype="float32")[:4])
    assert np.abs(maps).max() > 0


class Looked(nn.Module):
    """Integers go from one module to the next, and one module sees no batch."""

    @nn.compact
    def __call__(self, x):
        codes = Codes(name="codes")(x)
        looked_up = nn.Embed(4, 5, name="table")(codes).reshape(len(x), -1)
        average = nn.Dense(13, name="average")(x.mean(0))
        return nn.Dense(10)(jnp.concatenate([looked_up, x * average], -1))


class Codes(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.clip(jnp.floor(x * 4), 0, 3).astype(int)


def test_integers_and_values_without_a_batch_between_layers():
    model, parameters = wrap(Looked(), WINE)
    assert model.get_layer("codes").output.dtype == "int32"
    assert model.get_layer("average").output.shape == (13,)
    targets = np.eye(10, dtype="float32")[:4]
    for size in (2, 4):
        expected = Looked().apply(parameters, WINE[:size])
        assert largest_difference(chain(model)(WINE[:size]), expected) < 1e-6
    gradient = jax.grad(lambda x: (Looked().apply(parameters, x) * targets).sum())(WINE)
    assert largest_difference(Saliency(chain(model))(WINE, targets), np.abs(gradient)) < 1e-5


@pytest.mark.parametrize("value", [0.5, None], ids=["a number", "a parameter"])
def test_output_that_does_not_depend_on_the_input(value):
    class Constant(nn.Module):
        @nn.compact
        def __call__(self, x):
            bias = self.param("bias", SMALL, (10,))
            return jnp.full((len(x), 10), value) if value else jnp.tile(bias, (len(x), 1))

    model, parameters = wrap(Constant(), WINE)
    expected = Constant().apply(parameters, WINE)
    np.testing.assert_allclose(model(WINE), expected)
    np.testing.assert_allclose(chain(model)(WINE), expected)


def test_identity():
    class Identity(nn.Module):
        def __call__(self, x):
            return x

    model, _ = wrap(Identity(), WINE)
    np.testing.assert_array_equal(model(WINE), WINE)
    np.testing.assert_array_equal(chain(model)(WINE), WINE)


class Pooling(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), name="a")(nn.max_pool(nn.Conv(3, (3, 3), name="c")(x), (2, 2)))
        x = nn.Conv(3, (3, 3), name="b")(nn.avg_pool(x, (2, 2)))
        x = nn.Dense(10, name="d")(nn.avg_pool(x, (2, 2)).mean((1, 2)))
        return nn.Dense(10, name="e")(jax.nn.sigmoid(nn.softmax(nn.Dense(10, name="f")(x))))


def test_what_lies_between_modules_is_named_by_what_it_does():
    model, parameters = wrap(Pooling(), DIGITS)
    assert names(model) == [
        *("inputs", "c", "max_pool", "a", "avg_pool", "b", "mean", "d", "f", "sigmoid", "e")
    ]
    assert largest_difference(chain(model)(DIGITS), Pooling().apply(parameters, DIGITS)) < 1e-6


class TestWeights:
    def test_order_is_that_of_keras(self, residual):
        model, parameters = residual
        params, stats = parameters["params"]["Block_0"], parameters["batch_stats"]["Block_0"]
        expected = {
            "Block_0.Conv_0": [params["Conv_0"][k] for k in ("kernel", "bias")],
            "Block_0.BatchNorm_0": [params["BatchNorm_0"][k] for k in ("scale", "bias")]
            + [stats["BatchNorm_0"][k] for k in ("mean", "var")],
        }
        # jax.tree.map gives dicts with sorted keys, in which bias comes before kernel.
        sorted_keys = jax.tree.map(lambda leaf: leaf, parameters)
        other = FlaxWrapper(Residual(), sorted_keys, input_shape=(8, 8, 1))
        for wrapped in (model, other):
            for name, weights in expected.items():
                given = wrapped.get_layer(name).get_weights()
                assert len(given) == len(weights)
                for a, b in zip(given, weights, strict=True):
                    np.testing.assert_array_equal(a, b)

    def test_summary_counts_the_parameters(self, residual):
        model, parameters = residual
        lines = []
        model.summary(print_fn=lambda line, **_: lines.append(line))
        text = "".join(lines)
        total = sum(leaf.size for leaf in jax.tree.leaves(parameters))
        fixed = sum(leaf.size for leaf in jax.tree.leaves(parameters["batch_stats"]))
        assert f"Total params: {total:,}" in text
        assert f"Trainable params: {total - fixed:,}" in text
        assert f"Non-trainable params: {fixed:,}" in text
        assert "Block_0.Conv_0" in text

    @pytest.mark.parametrize("how", ["model", "layer", "variable"])
    def test_what_is_set_is_computed_with(self, how):
        model, parameters = wrap(Residual(), DIGITS)
        before = model(DIGITS).numpy()
        kernel = parameters["params"]["stem"]["kernel"] * -2.0
        layer = model.get_layer("stem")
        if how == "model":
            weights = model.get_weights()
            weights[0] = np.asarray(kernel)
            model.set_weights(weights)
        elif how == "layer":
            layer.set_weights([kernel, layer.get_weights()[1]])
        else:
            layer.weights[0].assign(kernel)
        changed = jax.tree.map(lambda leaf: leaf, parameters)
        changed["params"]["stem"]["kernel"] = kernel
        expected = Residual().apply(changed, DIGITS)
        assert np.abs(before - expected).max() > 1e-3
        assert largest_difference(model(DIGITS), expected) < 1e-6
        assert largest_difference(chain(model)(DIGITS), expected) < 1e-6
        explained = Saliency(model)(DIGITS, TARGETS)
        gradient = jax.grad(lambda x: (Residual().apply(changed, x) * TARGETS).sum())(DIGITS)
        assert largest_difference(explained, np.abs(gradient)) < 1e-5

    def test_clone_is_independent(self):
        model, parameters = wrap(Residual(), DIGITS)
        clone = tf.keras.models.clone_model(model)
        expected = Residual().apply(parameters, DIGITS)
        assert largest_difference(clone(DIGITS), expected) < 1e-6
        clone.set_weights([weight * 0 for weight in clone.get_weights()])
        np.testing.assert_allclose(clone(DIGITS), np.full((4, 10), 0.1), rtol=1e-6)
        assert largest_difference(model(DIGITS), expected) < 1e-6
        assert largest_difference(chain(model)(DIGITS), expected) < 1e-6

    def test_second_clone_is_not_compiled_again(self):
        model, _ = wrap(Residual(), DIGITS)
        tf.keras.models.clone_model(model)(DIGITS)
        clone = tf.keras.models.clone_model(model)
        with compilations() as compiled:
            clone(DIGITS)
            assert not compiled
            clone(np.concatenate([DIGITS, DIGITS]))
            assert compiled


def leaky(layer):
    if layer.name == "Block_0.relu":
        return tf.keras.layers.LeakyReLU(0.3, name=layer.name)
    return type(layer).from_config(layer.get_config())


def saturating(layer):
    config = layer.get_config()
    if layer.name == "Block_0.relu":
        config["max_value"] = 0.1
    return type(layer).from_config(config)


def with_a_layer_more(layer, *args, **kwargs):
    outputs = layer(*args, **kwargs)
    return tf.keras.layers.Rescaling(2.0)(outputs) if layer.name == "stem" else outputs


def with_an_operation_more(layer, *args, **kwargs):
    outputs = layer(*args, **kwargs)
    return outputs * 2 if layer.name == "stem" else outputs


def with_an_operation_at_the_end(layer, *args, **kwargs):
    outputs = layer(*args, **kwargs)
    return outputs * 2 if layer.name == "softmax" else outputs


def without_a_layer(layer, inputs, **kwargs):
    return inputs if layer.name == "Block_0.relu" else layer(inputs, **kwargs)


def connected_otherwise(layer, inputs, **kwargs):
    return layer([inputs[0]] * 2 if layer.name == "Block_0.add" else inputs, **kwargs)


class TestClones:
    """What Guided Backprop, DeconvNet and ModelRandomization explain."""

    @pytest.mark.parametrize(
        ("module", "inputs"), [("Residual", DIGITS), ("Shared", WINE), ("Tied", WINE)]
    )
    def test_is_one_call(self, module, inputs, calls):
        module = globals()[module]()
        model, parameters = wrap(module, inputs)
        clone = tf.keras.models.clone_model(model)
        calls.clear()
        outputs = clone(inputs)
        assert len(calls) == 1
        assert largest_difference(outputs, module.apply(parameters, inputs)) < 1e-6

    @pytest.mark.parametrize("method", [GuidedBackprop, DeconvNet])
    def test_guided_model_is_one_call(self, method, residual, calls):
        method(residual[0])(DIGITS, TARGETS)
        assert len(calls) == 1

    def test_model_with_a_users_relus_is_one_call_between_two(self, residual, calls):
        Saliency(override_relu_gradient(residual[0], users_policy(True)))(DIGITS, TARGETS)
        parts = 4  # that the three ReLUs leave; the last one is called for its gradient alone
        assert len(calls) == parts - 1 + parts

    def test_one_relu_of_the_user_among_those_of_xplique(self, residual, calls):
        expected = GuidedBackprop(residual[0])(DIGITS, TARGETS)
        explainer = GuidedBackprop(residual[0])
        explainer.model.get_layer("Block_0.relu").call = users_policy(True)()
        calls.clear()
        maps = explainer(DIGITS, TARGETS)
        assert len(calls) == 3  # one part before the ReLU, and the gradients of both
        assert largest_difference(maps, expected) < 1e-5

    @pytest.mark.parametrize(
        ("module", "read", "parts"), [(Residual, 3, 4), (Pooled, 1, 4), (TwoRows, 0, 2)]
    )
    def test_outputs_are_computed_where_a_gradient_reads_them(self, module, read, parts, calls):
        """The gradients of a softmax and of a maximum do, and not those of what is linear."""
        model, _ = wrap(module(), DIGITS)
        Saliency(override_relu_gradient(model, users_policy(False)))(DIGITS, TARGETS)
        assert len(calls) == read + parts

    def test_gradient_of_a_part_without_a_batch(self):
        """How many samples there are can't be told from its cotangent."""

        class Averaged(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(10)(x) + nn.relu(nn.Dense(10)(x).mean(0))

        graph = wrap(Averaged(), WINE)[0]._fused.graph
        mean = next(i for i, cell in enumerate(graph.cells) if cell.relu is not None) - 1
        function = graph.section(mean, mean + 1).function
        rows, cotangent = np.ones((4, 10), "float32"), np.arange(10, dtype="float32")
        (gradient,) = function.pullback({}, rows, cotangent)
        np.testing.assert_allclose(gradient, np.tile(cotangent / 4, (4, 1)))

    @pytest.mark.parametrize(
        "change",
        [
            {"clone_function": leaky},
            {"clone_function": saturating},
            {"call_function": with_a_layer_more},
            {"call_function": with_an_operation_more},
            {"call_function": with_an_operation_at_the_end},
            {"call_function": without_a_layer},
            {"call_function": connected_otherwise},
        ],
        ids=lambda change: next(iter(change.values())).__name__,
    )
    def test_what_is_changed_in_cloning_takes_part(self, residual, change):
        model, _ = residual
        clone = tf.keras.models.clone_model(model, **change)
        expected = chain(clone)(DIGITS)
        assert np.abs(expected - model(DIGITS)).max() > 1e-3
        np.testing.assert_array_equal(clone(DIGITS), expected)
        np.testing.assert_array_equal(tf.keras.models.clone_model(clone)(DIGITS), expected)

    def test_of_a_model_without_a_layer_of_flax(self):
        model = FlaxWrapper.from_function(jax.nn.relu, input_shape=(13,))
        clone = tf.keras.models.clone_model(model)
        np.testing.assert_array_equal(clone(WINE - 0.5), np.maximum(WINE - 0.5, 0))

    def test_wrapped_model_is_a_flax_wrapper(self, residual):
        model = residual[0]
        assert isinstance(model, FlaxWrapper)
        assert repr(model).startswith("<FlaxWrapper name=Residual")
        assert type(model).__qualname__ == "FlaxWrapper"
        assert model.__doc__ == FlaxWrapper.__doc__

        class Mine(FlaxWrapper):
            """A user's own."""

        mine = Mine(Residual(), residual[1], input_shape=DIGITS.shape[1:])
        assert type(mine) is Mine
        clone = tf.keras.models.clone_model(mine)
        assert largest_difference(clone(DIGITS), model(DIGITS)) < 1e-6


class TestReLUs:
    @pytest.mark.parametrize("module", [Residual, Pooled, TwoRows, Fourier])
    def test_gradients_of_changed_relus(self, module):
        """Guided Backprop and DeconvNet against their definition."""
        model, parameters = wrap(module(), DIGITS)
        guided = with_changed_relus(module(), parameters, lambda x, g: g * (x > 0))
        deconv = with_changed_relus(module(), parameters, lambda x, g: g)
        assert largest_difference(GuidedBackprop(model)(DIGITS, TARGETS), guided) < 1e-5
        assert largest_difference(DeconvNet(model)(DIGITS, TARGETS), deconv) < 1e-5
        for is_guided, expected in ((True, guided), (False, deconv)):
            changed = override_relu_gradient(model, users_policy(is_guided))
            maps = GradientInput(changed, reducer=None)(DIGITS, TARGETS)
            assert largest_difference(maps, DIGITS * expected) < 1e-5

    def test_gradient_of_a_layer_of_complex_numbers(self):
        """TensorFlow's gradient is the conjugate of JAX's: here it goes from one to the other."""
        model, parameters = wrap(Fourier(), DIGITS)
        layer, spectrum = model.get_layer("Spectrum_0"), parameters["params"]["Spectrum_0"]

        def power(x):
            return (jnp.abs(Spectrum().apply({"params": spectrum}, x) - (1 + 2j)) ** 2).sum()

        with tf.GradientTape() as tape:
            inputs = tf.constant(DIGITS)
            tape.watch(inputs)
            outputs = tf.reduce_sum(tf.abs(layer(inputs) - (1 + 2j)) ** 2)
        gradient = tape.gradient(outputs, inputs)
        assert largest_difference(gradient, jax.grad(power)(DIGITS)) < 1e-5

    def test_relu6_saturates(self):
        class Six(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.relu6(nn.Dense(10)(x) * 20)

        model, parameters = wrap(Six(), WINE)
        layer = next(layer for layer in model.layers if isinstance(layer, ReLU))
        assert layer.max_value == 6
        assert (np.asarray(Six().apply(parameters, WINE)) == 6).any()
        assert largest_difference(chain(model)(WINE), Six().apply(parameters, WINE)) < 1e-6

    def test_another_function_called_relu_is_no_relu(self):
        @jax.custom_jvp
        def relu(x):
            return jnp.maximum(x, 0) + 1

        relu.defjvp(lambda p, t: (relu(*p), jnp.where(p[0] > 0, t[0], 0)))

        class Own(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(10)(relu(nn.Dense(5)(x)))

        model, parameters = wrap(Own(), WINE)
        assert not any(isinstance(layer, ReLU) for layer in model.layers)
        assert largest_difference(chain(model)(WINE), Own().apply(parameters, WINE)) < 1e-6

    @pytest.mark.parametrize("name", ["hard_silu", "hard_sigmoid"])
    def test_activation_made_of_a_relu_is_no_relu(self, name):
        class Hard(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = getattr(jax.nn, name)(nn.Dense(8, name="first")(x * 4))
                return nn.Dense(10, name="last")(nn.relu(nn.Dense(8, name="second")(x)))

        model, _ = wrap(Hard(), WINE)
        inputs = tf.keras.Input((13,))
        hidden = tf.keras.layers.Dense(8, activation=name)(inputs * 4)
        hidden = tf.keras.layers.ReLU()(tf.keras.layers.Dense(8)(hidden))
        twin = tf.keras.Model(inputs, tf.keras.layers.Dense(10)(hidden))
        twin.set_weights(model.get_weights())
        targets = np.eye(10, dtype="float32")[:4]
        for method in (GuidedBackprop, DeconvNet, Saliency):
            maps = [method(each)(WINE, targets) for each in (model, twin)]
            assert largest_difference(*maps) < 1e-5

    @pytest.mark.parametrize("transform", [nn.jit, nn.remat])
    def test_modules_inside_transforms_are_found(self, transform):
        class Transformed(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = transform(Block)(1, name="one")(x)
                x = transform(Block)(1, name="two")(x)
                return nn.Dense(10)(x.reshape(len(x), -1))

        model, parameters = wrap(Transformed(), DIGITS)
        assert {"one.Conv_0", "one.relu", "two.Conv_1", "two.relu_1"} <= set(names(model))
        expected = Transformed().apply(parameters, DIGITS)
        assert largest_difference(chain(model)(DIGITS), expected) < 1e-6


def test_default_convolution_is_the_last_one(residual):
    model = residual[0]
    for method in (GradCAM, FEM):
        chosen = method(model)(DIGITS, TARGETS)
        by_name = method(model, conv_layer="Block_0.Conv_1")(DIGITS, TARGETS)
        by_index = method(model, conv_layer=names(model).index("Block_0.Conv_1"))(DIGITS, TARGETS)
        np.testing.assert_array_equal(chosen, by_name)
        np.testing.assert_array_equal(chosen, by_index)
        other = method(model, conv_layer="stem")(DIGITS, TARGETS)
        assert np.abs(chosen - other).max() > 1e-4


def test_dimension_that_depends_on_the_batch():
    value = Value(((2, 0), (0, 5), (1, 1)), "float32")
    assert value.shape(None) == (None, 5, None)
    assert value.shape(3) == (6, 5, 4)


class Unsteady(nn.Module):
    limit: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(13, name="first")(x)
        return nn.Dense(10)(nn.relu(x) if len(x) < self.limit else x)


def test_model_that_changes_with_the_batch_size():
    model, parameters = wrap(Unsteady(), WINE)
    assert largest_difference(model(WINE), Unsteady().apply(parameters, WINE)) < 1e-6
    with pytest.raises(ValueError, match="does other things for a batch of 4 samples"):
        chain(model)(WINE)
    with pytest.raises(ValueError, match="does other things for a batch of 4 samples"):
        model.truncate("Dense_0")(WINE)


def test_model_that_changes_between_the_batch_sizes_of_the_trace():
    with pytest.raises(ValueError, match="no one set of layers"):
        wrap(Unsteady(3), WINE)


class Small(nn.Module):
    """A model that takes no large batches."""

    @nn.compact
    def __call__(self, x):
        if len(x) > 64:
            raise ValueError("at most 64 samples")
        return nn.Dense(10)(nn.Dense(13, name="first")(x))


class Padded(nn.Module):
    """A model with a layer that is given a multiple of eight samples."""

    @nn.compact
    def __call__(self, x):
        padded = jnp.pad(x, ((0, -len(x) % 8), (0, 0)))
        return nn.Dense(10, name="first")(padded)[: len(x)]


class Nested(nn.Module):
    """A model with a layer whose inputs have one dimension more in a large batch."""

    @nn.compact
    def __call__(self, x):
        rows = x[:, :1].reshape(len(x), *((1,) if len(x) > 64 else ()), 1)
        columns = nn.Dense(5, name="first")(rows).reshape(len(x), 5, 1)
        return nn.Dense(10)(columns).sum(1)


@pytest.mark.parametrize("module", [Small(), Padded(), Nested()])
def test_layers_of_a_model_that_treats_large_batches_in_another_way(module):
    model, parameters = wrap(module, WINE)
    assert "first" in names(model)
    expected = module.apply(parameters, WINE)
    assert largest_difference(tf.function(chain(model))(WINE), expected) < 1e-6
    assert largest_difference(model(WINE), expected) < 1e-6


def test_every_layer_is_ours(residual):
    kinds = {type(layer) for layer in residual[0].layers[1:]}
    assert kinds == {FlaxLayer, ReLU}


def test_sub_model_predicts_and_takes_evaluation_mode():
    images = load_digits().images[:6, ..., None].astype("float32")
    module = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(2, (3, 3))])
    params = module.init(jax.random.key(0), images)
    wrapped = FlaxWrapper(module, params, input_shape=(8, 8, 1))
    features = tf.keras.Model(wrapped.input, wrapped.layers[2].output)
    expected = nn.relu(nn.Conv(4, (3, 3)).apply({"params": params["params"]["layers_0"]}, images))
    np.testing.assert_allclose(features.predict(images, verbose=0), expected, atol=1e-4)
    np.testing.assert_allclose(features(images, training=False), expected, atol=1e-4)


def test_convolution_with_channels_first_is_none_that_grad_cam_takes():
    class ChannelsFirst(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (16, 1, 3, 3))
            return jax.lax.conv(jnp.moveaxis(x, -1, 1), kernel, (1, 1), "SAME").mean((2, 3))

    images = load_digits().images[:2, ..., None].astype("float32")
    module = ChannelsFirst()
    wrapped = FlaxWrapper(module, module.init(jax.random.key(0), images), input_shape=(8, 8, 1))
    with pytest.raises(ValueError, match="no convolution with the channels last"):
        GradCAM(wrapped)
