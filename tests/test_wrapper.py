"""The wrapper as a Keras model: inputs, outputs, gradients, arguments, truncation."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import tensorflow as tf
from flax.core import freeze
from sklearn.datasets import load_digits
from xplique.attributions import Lime, Saliency
from xplique.metrics import Deletion

from xplique_flax import FlaxWrapper

DIGITS = (load_digits().images[:7, ..., None] / 16).astype("float32")
TARGETS = np.eye(10, dtype="float32")[load_digits().target[:7]]


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(6, (3, 3), bias_init=nn.initializers.normal())(x))
        x = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
        return nn.softmax(nn.Dense(10)(x.reshape(len(x), -1)))


MODULE = CNN()
PARAMETERS = MODULE.init(jax.random.key(0), DIGITS)


@pytest.fixture(params=[None, (8, 8, 1)], ids=["without a shape", "with a shape"], scope="module")
def wrapped(request):
    return FlaxWrapper(MODULE, PARAMETERS, input_shape=request.param)


def equal(given, expected, tolerance=1e-6):
    np.testing.assert_allclose(given, expected, rtol=tolerance, atol=tolerance)


def flax_gradient(inputs):
    """The gradient of a sum that weighs every output differently."""
    weights = jnp.arange(10.0)
    return jax.grad(lambda x: (MODULE.apply(PARAMETERS, x) @ weights).sum())(inputs)


def wrapped_gradient(model, inputs):
    weights = tf.range(10.0)[:, None]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        total = tf.reduce_sum(model(inputs) @ weights)
    return tape.gradient(total, inputs)


def test_is_a_keras_model(wrapped):
    assert isinstance(wrapped, tf.keras.Model)
    assert isinstance(wrapped, keras.Model)


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_output_and_gradient(wrapped, size, graph):
    inputs = DIGITS[:size]
    call = tf.function(wrapped) if graph else wrapped
    gradient = tf.function(wrapped_gradient) if graph else wrapped_gradient
    equal(call(inputs), MODULE.apply(PARAMETERS, inputs))
    equal(gradient(wrapped, tf.constant(inputs)), flax_gradient(inputs))


def test_unknown_batch_size(wrapped):
    signature = [tf.TensorSpec((None, 8, 8, 1))]
    call = tf.function(wrapped, input_signature=signature)
    gradient = tf.function(lambda x: wrapped_gradient(wrapped, x), input_signature=signature)
    assert call.get_concrete_function().output_shapes == tf.TensorShape((None, 10))
    for size in (1, 3):
        equal(call(DIGITS[:size]), MODULE.apply(PARAMETERS, DIGITS[:size]))
        equal(gradient(DIGITS[:size]), flax_gradient(DIGITS[:size]))
    assert call(DIGITS[:0]).shape == (0, 10)


@pytest.mark.parametrize("shape", [None, (None, None, None, 1)], ids=str)
def test_unknown_shape(wrapped, shape):
    call = tf.function(wrapped, input_signature=[tf.TensorSpec(shape)])
    equal(call(DIGITS), MODULE.apply(PARAMETERS, DIGITS))


def test_empty_batch(wrapped):
    assert wrapped(DIGITS[:0]).shape == (0, 10)
    assert wrapped_gradient(wrapped, tf.constant(DIGITS[:0])).shape == (0, 8, 8, 1)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "uint8", "bool"])
def test_dtypes(wrapped, dtype):
    inputs = (DIGITS * 3).astype(dtype)
    output = wrapped(inputs)
    assert output.dtype == tf.float32
    equal(output, MODULE.apply(PARAMETERS, inputs.astype("float32")))
    if dtype.startswith("float"):
        gradient = wrapped_gradient(wrapped, tf.constant(inputs))
        assert gradient.dtype == dtype
        tolerance = 1e-6 if dtype == "float64" else 2e-3
        equal(gradient, flax_gradient(inputs.astype("float32")), tolerance)


def test_lists_and_tensors(wrapped):
    expected = MODULE.apply(PARAMETERS, DIGITS)
    equal(wrapped(DIGITS.tolist()), expected)
    equal(wrapped(tf.constant(DIGITS)), expected)
    equal(wrapped(jnp.asarray(DIGITS)), expected)


def test_nan(wrapped):
    assert np.isnan(wrapped(np.full_like(DIGITS, np.nan))).all()


def test_second_order_gradient(wrapped):
    def penalty(x):
        return (jax.grad(lambda v: (MODULE.apply(PARAMETERS, v) ** 2).sum())(x) ** 2).sum()

    inputs = tf.constant(DIGITS)
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as inner:
            inner.watch(inputs)
            total = tf.reduce_sum(wrapped(inputs) ** 2)
        first = inner.gradient(total, inputs)
        penalised = tf.reduce_sum(first**2)
    expected = jax.grad(penalty)(DIGITS)
    assert np.abs(expected).max() > 0
    equal(
        outer.gradient(penalised, inputs) / np.abs(expected).max(),
        expected / np.abs(expected).max(),
        1e-5,
    )


def test_predict(wrapped):
    expected = MODULE.apply(PARAMETERS, DIGITS)
    equal(wrapped.predict(DIGITS, batch_size=3, verbose=0), expected)
    dataset = tf.data.Dataset.from_tensor_slices(DIGITS).batch(4)
    equal(wrapped.predict(dataset, verbose=0), expected)


def test_data_sets_in_xplique(wrapped):
    dataset = tf.data.Dataset.from_tensor_slices((DIGITS, TARGETS)).batch(3)
    equal(Saliency(wrapped)(dataset, None), Saliency(wrapped)(DIGITS, TARGETS))


def test_part_of_another_model(wrapped):
    outer = tf.keras.Sequential([tf.keras.Input((8, 8, 1)), wrapped, tf.keras.layers.Softmax()])
    assert outer.output_shape == (None, 10)
    equal(outer(DIGITS), jax.nn.softmax(MODULE.apply(PARAMETERS, DIGITS)))


def test_whole_calls_are_one_call_of_jax(monkeypatch):
    from xplique_flax.bridge import Bridge

    calls = []
    original = Bridge.execute
    monkeypatch.setattr(Bridge, "execute", lambda *args: calls.append(1) or original(*args))
    model = FlaxWrapper(MODULE, PARAMETERS, input_shape=(8, 8, 1))
    model(DIGITS)
    assert len(calls) == 1
    calls.clear()
    # In a graph the output that nobody needs is not computed: one call for the gradient.
    Saliency(model)(DIGITS, TARGETS)
    assert len(calls) == 1
    calls.clear()
    Lime(model, nb_samples=6)(DIGITS[:1], TARGETS[:1])
    assert len(calls) == 1


class Flagged(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        return {"logits": nn.Dense(10)(x), "all": (x, x * 2)}


@pytest.mark.parametrize("frozen", [False, True], ids=["dict", "FrozenDict"])
@pytest.mark.parametrize("shape", [None, (64,)])
def test_flags_collections_and_structured_outputs(frozen, shape):
    rows = DIGITS.reshape(7, -1)
    module = Flagged()
    parameters = module.init(jax.random.key(1), rows, train=False)
    parameters["batch_stats"] = jax.tree.map(lambda a: a + 0.7, parameters["batch_stats"])
    expected = module.apply(parameters, rows, train=False)
    parameters = freeze(parameters) if frozen else parameters

    def wrap(output, **kwargs):
        return FlaxWrapper(
            module,
            parameters,
            apply_kwargs={"train": False},
            output=output,
            input_shape=shape,
            **kwargs,
        )(rows)

    equal(wrap("logits"), expected["logits"])
    equal(wrap(lambda out: out["all"][1]), expected["all"][1])


@flax.struct.dataclass
class Prediction:
    logits: jax.Array
    features: jax.Array


@pytest.mark.parametrize("shape", [None, (64,)])
def test_field_of_a_dataclass(shape):
    class Predicting(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Prediction(logits=nn.Dense(10)(x), features=x)

    rows = DIGITS.reshape(7, -1)
    parameters = Predicting().init(jax.random.key(1), rows)
    model = FlaxWrapper(Predicting(), parameters, output="logits", input_shape=shape)
    equal(model(rows), Predicting().apply(parameters, rows).logits)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x), nn.Dense(3)(x)

    @nn.compact
    def second(self, x):
        return nn.Dense(5, name="apart")(x)


@pytest.mark.parametrize("shape", [None, (64,)])
def test_index_and_method(shape):
    rows = DIGITS.reshape(7, -1)
    module = Pair()
    parameters = module.init(jax.random.key(1), rows)
    for index in (0, 1, -1):
        given = FlaxWrapper(module, parameters, output=index, input_shape=shape)(rows)
        equal(given, module.apply(parameters, rows)[index])
    parameters = module.init(jax.random.key(1), rows, method="second")
    expected = module.apply(parameters, rows, method="second")
    for method in ("second", Pair.second):
        equal(FlaxWrapper(module, parameters, method=method, input_shape=shape)(rows), expected)


@pytest.mark.parametrize("shape", [None, (64,)])
def test_random_streams(shape):
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(10)(x))

    rows = DIGITS.reshape(7, -1)
    streams = {"dropout": jax.random.key(3)}
    parameters = Noisy().init({"params": jax.random.key(0), **streams}, rows)
    expected = Noisy().apply(parameters, rows, rngs=streams)
    assert (np.asarray(expected) == 0).any()
    model = FlaxWrapper(Noisy(), parameters, rngs=streams, input_shape=shape)
    equal(model(rows), expected)
    equal(model(rows), expected)


def test_two_wrappers_do_not_mix():
    other = jax.tree.map(lambda a: -a, PARAMETERS)
    models = [FlaxWrapper(MODULE, p) for p in (PARAMETERS, other)]
    maps = [Saliency(model)(DIGITS, TARGETS).numpy() for model in models]
    assert np.abs(maps[0] - maps[1]).max() > 1e-3
    again = [Saliency(model)(DIGITS, TARGETS).numpy() for model in models]
    np.testing.assert_array_equal(maps, again)


class TestTruncate:
    @pytest.fixture
    def model(self):
        return FlaxWrapper(MODULE, PARAMETERS, input_shape=(8, 8, 1))

    def test_it_is_the_model_up_to_the_layer(self, model):
        truncated = model.truncate("Dense_0")
        assert isinstance(truncated, FlaxWrapper)
        expected = jnp.log(MODULE.apply(PARAMETERS, DIGITS))
        logits = truncated(DIGITS).numpy()
        equal(
            logits - logits.mean(-1, keepdims=True),
            expected - expected.mean(-1, keepdims=True),
            1e-5,
        )
        inside = tf.keras.Model(model.inputs, model.get_layer("Dense_0").output)
        equal(logits, inside(tf.constant(DIGITS)))
        index = [layer.name for layer in model.layers].index("Dense_0")
        equal(model.truncate(index)(DIGITS), logits)

    def test_it_can_be_looked_into_and_truncated_again(self, model):
        truncated = model.truncate("Dense_0")
        assert [layer.name for layer in truncated.layers] == [layer.name for layer in model.layers][
            : len(truncated.layers)
        ]
        equal(truncated.truncate("Conv_1")(DIGITS), model.truncate("Conv_1")(DIGITS))

    def test_it_keeps_weights_that_were_set(self, model):
        model.set_weights([weight * 1.5 for weight in model.get_weights()])
        truncated = model.truncate("Dense_0")
        inside = tf.keras.Model(model.inputs, model.get_layer("Dense_0").output)
        equal(truncated(DIGITS), inside(tf.constant(DIGITS)))

    @pytest.mark.parametrize("which", ["keras", "flax"])
    def test_output_layer_of_xplique_has_no_effect(self, which, model):
        """Shows what ``truncate`` is for; it fails with a release of Xplique that mends it."""
        if which == "keras":
            inputs = tf.keras.Input((8, 8, 1))
            logits = tf.keras.layers.Dense(10, name="Dense_0")(tf.keras.layers.Flatten()(inputs))
            model = tf.keras.Model(inputs, tf.keras.layers.Softmax()(logits))
            truncated = tf.keras.Model(inputs, logits)
        else:
            truncated = model.truncate("Dense_0")
        whole = Saliency(model)(DIGITS, TARGETS)
        np.testing.assert_array_equal(
            Saliency(model, output_layer="Dense_0")(DIGITS, TARGETS), whole
        )
        of_logits = Saliency(truncated)(DIGITS, TARGETS)
        assert np.abs(of_logits - whole).max() > 0.1 * np.abs(whole).max()


def test_quickstart_of_the_page_that_users_come_from():
    params = MODULE.init(jax.random.PRNGKey(0), DIGITS)
    wrapped_model = FlaxWrapper(MODULE, params)
    explainer = Saliency(wrapped_model)
    explanations = explainer(DIGITS, TARGETS)
    metric = Deletion(wrapped_model, DIGITS, TARGETS)
    score = metric(explanations)
    assert explanations.shape == (7, 8, 8, 1)
    gradient = jax.grad(lambda x: (MODULE.apply(params, x) * TARGETS).sum())(DIGITS)
    equal(explanations, np.abs(gradient))
    assert 0 < score < 1
