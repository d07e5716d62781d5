"""What Flax users bring: NNX, bound modules, training states, plain functions, parts of a model."""

import copy
import threading

import equinox as eqx
import flax.linen as nn
import flax.serialization
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorflow as tf
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from safetensors.flax import load_file, save_file
from xplique.attributions import GradCAM, GuidedBackprop, Occlusion, Saliency

from tests.architectures import ARCHITECTURES, digits, make_pair
from tests.equality_table import largest_difference
from xplique_flax import FlaxWrapper

IMAGES, TARGETS = digits(5)
SHAPE = IMAGES.shape[1:]


def same(ours, reference, tolerance=1e-5):
    assert largest_difference(ours, reference) <= tolerance


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(10)(x.reshape((len(x), -1)))


@pytest.fixture(scope="module")
def variables():
    return Small().init(jax.random.key(0), IMAGES)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(256, 10, rngs=rngs)

    def features(self, x):
        return self.dropout(nnx.relu(self.norm(self.conv(x))))

    def __call__(self, x):
        return self.last(self.features(x).reshape((len(x), -1)))

    def flagged(self, x, factor):
        return self(x) * factor


def evaluated(module):
    view = nnx.clone(module)
    view.eval()
    return view


def values(net):
    leaves = jax.tree.leaves(nnx.state(net))
    return [
        np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        for leaf in leaves
    ]


class TestNNX:
    def test_users_module_is_not_changed(self):
        net = Net(nnx.Rngs(0))
        before = values(net)
        wrapped = FlaxWrapper(net, input_shape=SHAPE)
        Saliency(wrapped)(IMAGES, TARGETS)
        GradCAM(wrapped)(IMAGES, TARGETS)
        assert not net.norm.use_running_average
        assert not net.dropout.deterministic
        assert type(net.conv) is nnx.Conv
        for old, new in zip(before, values(net), strict=True):
            np.testing.assert_array_equal(old, new)

    def test_later_changes_are_not_seen(self):
        net = Net(nnx.Rngs(0))
        wrapped = FlaxWrapper(net)
        before = wrapped(IMAGES).numpy()
        net.last.kernel[...] = net.last.kernel[...] * 2
        np.testing.assert_array_equal(wrapped(IMAGES), before)

    def test_evaluation_mode_is_the_default(self):
        net = Net(nnx.Rngs(0))
        same(FlaxWrapper(net)(IMAGES), evaluated(net)(IMAGES))
        same(FlaxWrapper(net, eval_mode=True)(IMAGES), evaluated(net)(IMAGES))

    def test_training_mode_when_asked_for(self):
        net = Net(nnx.Rngs(0))
        reference = nnx.clone(net)(IMAGES)
        wrapped = FlaxWrapper(net, eval_mode=False, input_shape=SHAPE)
        same(wrapped(IMAGES), reference)
        np.testing.assert_array_equal(wrapped(IMAGES), wrapped(IMAGES))
        assert largest_difference(wrapped(IMAGES), evaluated(net)(IMAGES)) > 0.1

    def test_mode_of_a_module_in_evaluation_mode_is_kept(self):
        net = evaluated(Net(nnx.Rngs(0)))
        same(FlaxWrapper(net, eval_mode=False)(IMAGES), net(IMAGES))

    def test_method_and_arguments(self):
        net = Net(nnx.Rngs(0))
        reference = evaluated(net)
        by_name = FlaxWrapper(net, method="flagged", apply_kwargs={"factor": 3})
        same(by_name(IMAGES), 3 * reference(IMAGES))
        by_function = FlaxWrapper(net, method=lambda module, x: module(x)[:, :4])
        same(by_function(IMAGES), reference(IMAGES)[:, :4])

    def test_gradient(self):
        net = Net(nnx.Rngs(0))
        expected = jax.grad(lambda x: (evaluated(net)(x) * TARGETS).sum())(IMAGES)
        same(Saliency(FlaxWrapper(net))(IMAGES, TARGETS)[..., 0], abs(expected).max(-1))

    def test_inner_layers_equal_what_the_modules_compute(self):
        net = Net(nnx.Rngs(0))
        wrapped = FlaxWrapper(net, input_shape=SHAPE)
        reference = evaluated(net)
        for layer, expected in {
            "conv": reference.conv(IMAGES),
            "norm": reference.norm(reference.conv(IMAGES)),
            "relu": reference.features(IMAGES),
        }.items():
            part = tf.keras.Model(wrapped.input, wrapped.get_layer(layer).output)
            same(part(IMAGES), expected)
            same(wrapped.truncate(layer)(IMAGES), expected)

    @pytest.mark.parametrize("transform", ["remat", "jit"])
    def test_transformed_modules(self, transform):
        class Inner(nnx.Module):
            def __init__(self, rngs):
                self.dense = nnx.Linear(10, 10, rngs=rngs)

            @getattr(nnx, transform)
            def __call__(self, x):
                return nnx.relu(self.dense(x))

        class Outer(nnx.Module):
            def __init__(self, rngs):
                self.first = nnx.Linear(64, 10, rngs=rngs)
                self.inner = Inner(rngs)

            def __call__(self, x):
                return self.inner(self.first(x.reshape((len(x), -1))))

        net = Outer(nnx.Rngs(0))
        wrapped = FlaxWrapper(net, input_shape=SHAPE)
        same(wrapped(IMAGES), net(IMAGES))
        assert {"first", "inner.dense", "inner"} <= {layer.name for layer in wrapped.layers}
        GuidedBackprop(wrapped)(IMAGES, TARGETS)

    def test_linen_module_inside(self, variables):
        """`nnx.bridge.ToNNX`: its submodules are layers, under the attribute's name."""

        class Bridged(nnx.Module):
            def __init__(self, rngs):
                self.linen = nnx.bridge.ToNNX(Small(), rngs).lazy_init(IMAGES)
                self.last = nnx.Linear(10, 10, rngs=rngs)

            def __call__(self, x):
                return self.last(nnx.relu(self.linen(x)))

        net = Bridged(nnx.Rngs(0))
        wrapped = FlaxWrapper(net, input_shape=SHAPE)
        same(wrapped(IMAGES), net(IMAGES))
        assert {"linen.Conv_0", "linen.BatchNorm_0", "linen", "last"} <= {
            layer.name for layer in wrapped.layers
        }
        expected = jax.grad(lambda x: (nnx.clone(net)(x) * TARGETS).sum())(IMAGES)
        same(Saliency(wrapped)(IMAGES, TARGETS)[..., 0], abs(expected).max(-1))

    def test_nnx_module_inside_linen(self):
        """`nnx.bridge.ToLinen`: a Linen module as any other."""
        linen = nnx.bridge.to_linen(nnx.Linear, 64, 10)
        flat = IMAGES.reshape(len(IMAGES), -1)
        parameters = linen.init(jax.random.key(0), flat)
        wrapped = FlaxWrapper(linen, parameters, input_shape=(64,))
        same(wrapped(flat), linen.apply(parameters, flat))

    def test_threads_trace_at_the_same_time(self):
        net = Net(nnx.Rngs(0))
        names = []

        def wrap():
            wrapped = FlaxWrapper(net, input_shape=SHAPE)
            names.append([layer.name for layer in wrapped.layers])

        threads = [threading.Thread(target=wrap) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = ["inputs", "conv", "norm", "relu", "dropout", "reshape", "last"]
        assert names == [expected] * 4


class TestOtherFormsOfLinenModels:
    def test_bound_module(self, variables):
        wrapped = FlaxWrapper(Small().bind(variables), input_shape=SHAPE)
        same(wrapped(IMAGES), Small().apply(variables, IMAGES))
        assert "Conv_0" in [layer.name for layer in wrapped.layers]

    def test_train_state(self, variables):
        class StateWithStatistics(TrainState):
            batch_stats: dict
            note: str = "no collection"

        state = StateWithStatistics.create(apply_fn=Small().apply, tx=optax.sgd(0.1), **variables)
        wrapped = FlaxWrapper.from_train_state(Small(), state, input_shape=SHAPE)
        same(wrapped(IMAGES), Small().apply(variables, IMAGES))
        assert wrapped.input_shape == (None, *SHAPE)

    def test_train_state_with_everything_in_params(self, variables):
        state = TrainState.create(
            apply_fn=Small().apply, params=freeze(variables), tx=optax.identity()
        )
        wrapped = FlaxWrapper.from_train_state(Small(), state)
        same(wrapped(IMAGES), Small().apply(variables, IMAGES))

    @pytest.mark.parametrize("form", ["msgpack", "orbax", "safetensors"])
    def test_restored_from_a_file(self, form, variables, tmp_path):
        if form == "msgpack":
            (tmp_path / "file").write_bytes(flax.serialization.to_bytes(variables))
            template = Small().init(jax.random.key(1), IMAGES)
            restored = flax.serialization.from_bytes(template, (tmp_path / "file").read_bytes())
        elif form == "orbax":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "folder", variables)
            with ocp.StandardCheckpointer() as checkpointer:
                restored = checkpointer.restore(tmp_path / "folder")
        else:
            save_file(flatten_dict(variables, sep="."), tmp_path / "file")
            restored = unflatten_dict(load_file(tmp_path / "file"), sep=".")
        wrapped = FlaxWrapper(Small(), restored, input_shape=SHAPE)
        same(wrapped(IMAGES), Small().apply(variables, IMAGES))
        expected = FlaxWrapper(Small(), variables, input_shape=SHAPE)
        same(GradCAM(wrapped)(IMAGES, TARGETS), GradCAM(expected)(IMAGES, TARGETS))

    def test_preprocess(self, variables):
        """From uint8, channels first; explanations are of what was given."""
        raw = np.moveaxis(np.rint(IMAGES * 255).astype("uint8"), -1, 1)

        def preprocess(x):
            return jnp.moveaxis(x, 1, -1) / 255

        wrapped = FlaxWrapper(Small(), variables, input_shape=raw.shape[1:], preprocess=preprocess)
        without = FlaxWrapper(Small(), variables, input_shape=SHAPE)
        inputs = np.moveaxis(raw, 1, -1).astype("float32") / 255
        same(wrapped(raw), without(inputs))
        with tf.GradientTape() as tape:
            tensor = tf.constant(raw, tf.float32)
            tape.watch(tensor)
            score = tf.reduce_sum(wrapped(tensor) * TARGETS)
        expected = jax.grad(lambda x: (Small().apply(variables, preprocess(x)) * TARGETS).sum())
        same(tape.gradient(score, tensor), expected(raw.astype("float32")))
        part = tf.keras.Model(wrapped.input, wrapped.get_layer("Conv_0").output)
        same(part(raw), without.truncate("Conv_0")(inputs))


class TestFunctions:
    def test_of_inputs(self):
        wrapped = FlaxWrapper.from_function(lambda x: (x**2).sum((1, 2)))
        same(wrapped(IMAGES), (IMAGES**2).sum((1, 2)))
        explanations = Saliency(wrapped)(IMAGES, np.ones((5, 1), "float32"))
        same(explanations[..., 0], 2 * IMAGES[..., 0])

    def test_of_parameters_and_inputs_equals_the_module(self, variables):
        wrapped = FlaxWrapper.from_function(Small().apply, variables, input_shape=SHAPE)
        module = FlaxWrapper(Small(), variables, input_shape=SHAPE)
        for explainer in (
            Saliency,
            GuidedBackprop,
            lambda model: Occlusion(model, patch_size=2, patch_stride=2),
        ):
            same(explainer(wrapped)(IMAGES, TARGETS), explainer(module)(IMAGES, TARGETS))

    def test_equinox(self):
        model = eqx.nn.MLP(64, 10, 16, 2, key=jax.random.key(0))

        def apply(model, x):
            return jax.vmap(model)(x.reshape((len(x), -1)))

        wrapped = FlaxWrapper.from_function(apply, model, input_shape=SHAPE)
        same(wrapped(IMAGES), apply(model, IMAGES))
        expected = jax.grad(lambda x: (apply(model, x) * TARGETS).sum())(IMAGES)
        same(Saliency(wrapped)(IMAGES, TARGETS)[..., 0], abs(expected).max(-1))
        assert sum(isinstance(layer, tf.keras.layers.ReLU) for layer in wrapped.layers) == 2
        assert wrapped.count_params() == 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10

    def test_haiku(self):
        transformed = hk.without_apply_rng(
            hk.transform(lambda x: hk.nets.MLP([16, 10])(hk.Flatten()(x)))
        )
        parameters = transformed.init(jax.random.key(0), IMAGES)
        wrapped = FlaxWrapper.from_function(transformed.apply, parameters, input_shape=SHAPE)
        same(wrapped(IMAGES), transformed.apply(parameters, IMAGES))
        expected = jax.grad(lambda x: (transformed.apply(parameters, x) * TARGETS).sum())(IMAGES)
        same(Saliency(wrapped)(IMAGES, TARGETS)[..., 0], abs(expected).max(-1))
        other = transformed.init(jax.random.key(1), IMAGES)
        same(wrapped.with_parameters(other)(IMAGES), transformed.apply(other, IMAGES))

    def test_names_make_layers(self):
        rng = np.random.default_rng(0)
        parameters = {
            "kernel": rng.normal(size=(3, 3, 1, 4)).astype("float32"),
            "weights": rng.normal(size=(256, 10)).astype("float32"),
            "activation": jax.nn.relu,  # no array: a constant
            "factor": 2,
        }

        def model(parameters, x):
            x = jax.lax.conv_general_dilated(
                x, parameters["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = parameters["activation"](checkpoint_name(x, "conv"))
            x = checkpoint_name(x.reshape((len(x), -1)) @ parameters["weights"], "last")
            return x * parameters["factor"]

        wrapped = FlaxWrapper.from_function(model, parameters, input_shape=SHAPE)
        assert [layer.name for layer in wrapped.layers][1:4] == ["conv", "relu", "last"]
        assert [array.shape for array in wrapped.get_weights()] == [(3, 3, 1, 4), (256, 10)]
        same(wrapped(IMAGES), model(parameters, IMAGES))
        twin = tf.keras.Sequential(
            [
                tf.keras.Input(SHAPE),
                tf.keras.layers.Conv2D(4, 3, padding="same", use_bias=False),
                tf.keras.layers.ReLU(),
                tf.keras.layers.Flatten(),
                tf.keras.layers.Dense(10, use_bias=False),
                tf.keras.layers.Rescaling(2),
            ]
        )
        twin.set_weights(wrapped.get_weights())
        for explainer in (GradCAM, GuidedBackprop):
            same(explainer(wrapped)(IMAGES, TARGETS), explainer(twin)(IMAGES, TARGETS))

    def test_names_that_are_used_twice(self):
        def model(x):
            return checkpoint_name(checkpoint_name(x * 2, "same") + 1, "same").sum((1, 2))

        wrapped = FlaxWrapper.from_function(model, input_shape=SHAPE)
        assert [layer.name for layer in wrapped.layers][1:3] == ["same", "same_1"]
        same(wrapped.truncate("same")(IMAGES), IMAGES * 2)
        same(wrapped.truncate("same_1")(IMAGES), IMAGES * 2 + 1)


SPLIT = [
    ("plain", "relu_1"),
    ("residual", "Block_0.relu_1"),
    ("nested", "encoder"),
    ("nnx_residual", "blocks.0"),
    ("perceptron", "Dense_1"),
]


class TestParts:
    @pytest.mark.parametrize(("name", "layer"), SPLIT)
    def test_cutting_and_rejoining_is_the_whole(self, name, layer):
        pair = make_pair(name)
        features, head = pair.wrapped.split(layer)
        activations = features(pair.inputs)
        same(activations, pair.wrapped.truncate(layer)(pair.inputs))
        same(head(activations), pair.wrapped(pair.inputs))
        same(head(activations[:1]), pair.wrapped(pair.inputs[:1]))
        assert features.output_shape == head.input_shape

    @pytest.mark.parametrize(("name", "layer"), SPLIT)
    def test_gradients_go_through_both(self, name, layer):
        pair = make_pair(name)
        features, head = pair.wrapped.split(layer)

        def gradient(model):
            with tf.GradientTape() as tape:
                inputs = tf.constant(pair.inputs)
                tape.watch(inputs)
                score = tf.reduce_sum(model(inputs) * pair.targets)
            return tape.gradient(score, inputs)

        same(gradient(lambda x: head(features(x))), gradient(pair.wrapped))

    def test_head_equals_the_twins(self):
        pair = make_pair("plain")
        _, head = pair.wrapped.split("relu_1")
        twin = tf.keras.Model(pair.twin.get_layer("relu_1").output, pair.twin.output)
        activations = pair.wrapped.truncate("relu_1")(pair.inputs)
        same(head(activations), twin(activations))
        assert {"Dense_0", "relu", "Dense_1"} <= {layer.name for layer in head.layers}

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_layers_that_something_goes_past_are_refused(self, name):
        """Every layer either is refused, or cuts the model in two."""
        pair = make_pair(name)
        refused = []
        for layer in pair.wrapped.layers[1:]:
            try:
                features, head = pair.wrapped.split(layer.name)
            except ValueError as error:
                refused.append(layer.name)
                text = str(error)
                assert f"`layer` is '{layer.name}'" in text
                parts = "skip connection", "Accepted are layers with one", "computes nothing"
                assert any(part in text for part in parts)
            else:
                same(head(features(pair.inputs)), pair.wrapped(pair.inputs))
        if name == "residual":
            assert "Block_0.Conv_0" in refused
            assert "Block_0" not in refused


class TestWithParameters:
    def test_equals_a_new_wrapper_and_compiles_nothing(self, variables):
        other = jax.tree.map(lambda leaf: leaf * 1.5, variables)
        wrapped = FlaxWrapper(Small(), variables, input_shape=SHAPE)
        before = wrapped(IMAGES).numpy()
        compiled = wrapped._fused.compiled.jitted.compilations
        again = wrapped.with_parameters(other)
        same(again(IMAGES), Small().apply(other, IMAGES))
        assert again._fused.compiled.jitted.compilations == compiled
        np.testing.assert_array_equal(wrapped(IMAGES), before)
        new = FlaxWrapper(Small(), other, input_shape=SHAPE)
        for explainer in (Saliency, GradCAM, GuidedBackprop):
            same(explainer(again)(IMAGES, TARGETS), explainer(new)(IMAGES, TARGETS))
        for own, expected in zip(again.get_weights(), new.get_weights(), strict=True):
            np.testing.assert_array_equal(own, expected)

    def test_nnx(self):
        net, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
        wrapped = FlaxWrapper(net, input_shape=SHAPE)
        same(wrapped.with_parameters(other)(IMAGES), evaluated(other)(IMAGES))
        same(wrapped.with_parameters(nnx.state(other))(IMAGES), evaluated(other)(IMAGES))

    def test_function_and_parts(self, variables):
        other = jax.tree.map(lambda leaf: leaf * 1.5, variables)
        wrapped = FlaxWrapper.from_function(Small().apply, variables, input_shape=SHAPE)
        same(wrapped.with_parameters(other)(IMAGES), Small().apply(other, IMAGES))
        module = FlaxWrapper(Small(), variables, input_shape=SHAPE)
        features, head = (part.with_parameters(other) for part in module.split("Conv_0"))
        same(head(features(IMAGES)), Small().apply(other, IMAGES))

    def test_without_input_shape(self, variables):
        other = jax.tree.map(lambda leaf: leaf * 1.5, variables)
        wrapped = FlaxWrapper(Small(), variables)
        same(wrapped.with_parameters(other)(IMAGES), Small().apply(other, IMAGES))


class TestListing:
    def test_layers_and_what_has_none(self):
        class Idle(nn.Module):
            @nn.compact
            def __call__(self, x):
                nn.Dense(2, name="idle")(x)
                return nn.Dense(3, name="used")(x)

        flat = IMAGES.reshape(len(IMAGES), -1)
        parameters = Idle().init(jax.random.key(0), flat)
        listed = FlaxWrapper(Idle(), parameters, input_shape=(64,)).list_layers()
        assert listed[0] == ("used", (None, 3), "")
        (idle,) = listed[1:]
        assert (idle.name, idle.shape) == ("idle", None)
        assert "does not depend on" in idle.reason

    def test_parameter_of_several_layers(self):
        listed = {layer.name: layer for layer in make_pair("stack").wrapped.list_layers()}
        assert "holds a parameter" in listed["blocks.conv.kernel"].reason
        assert listed["blocks.2.conv"] == ("blocks.2.conv", (None, 8, 8, 4), "")

    def test_every_listed_layer_is_found(self):
        wrapped = make_pair("nnx_residual").wrapped
        for layer in wrapped.list_layers():
            assert not layer.reason
            assert tuple(wrapped.get_layer(layer.name).output.shape) == layer.shape
        assert copy.copy(wrapped.list_layers()) == wrapped.list_layers()
