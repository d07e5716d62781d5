"""The user's program stays as it was: configuration, random states, module, threads, memory."""

import gc
import random
import threading
import weakref
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_wine
from tensorflow.python.autograph.impl import api
from xplique.attributions import (
    DeconvNet,
    GradientInput,
    GuidedBackprop,
    IntegratedGradients,
    Occlusion,
    Saliency,
)
from xplique.attributions.base import BlackBoxExplainer

from tests.compilations import compilations
from xplique_flax import FlaxWrapper
from xplique_flax.release import CacheEntry

WINE = (load_wine().data[:6] / load_wine().data.max(0)).astype("float32")
TARGETS = np.eye(3, dtype="float32")[[0, 1, 2, 0, 1, 2]]


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.softmax(nn.Dense(3)(nn.relu(nn.Dense(8)(x))))


class Waves(nn.Module):
    """What TensorFlow's graphs call JAX for."""

    @nn.compact
    def __call__(self, x):
        return nn.softmax(nn.Dense(3)(nn.relu(jnp.sin(nn.Dense(8)(x)))))


MODULE = MLP()
PARAMETERS = MODULE.init(jax.random.key(0), WINE)


def state():
    np_state = np.random.get_state()
    jax_config = {name: getattr(jax.config, name, None) for name in dir(jax.config)}
    return {
        "python": random.getstate(),
        "numpy": (np_state[0], np_state[1].tobytes(), *np_state[2:]),
        "tensorflow": tf.random.get_global_generator().state.numpy().tobytes(),
        "eager": tf.config.functions_run_eagerly(),
        "jax": {
            name: value
            for name, value in jax_config.items()
            if isinstance(value, bool | int | str | type(None))
        },
        "keras": (keras.config.floatx(), keras.config.dtype_policy().name, keras.backend.backend()),
        "autograph": tf.autograph.get_verbosity() if hasattr(tf.autograph, "get_verbosity") else 0,
    }


@pytest.mark.parametrize("shape", [None, (13,)])
def test_program_stays_as_it_was(shape):
    Saliency(FlaxWrapper(MODULE, PARAMETERS))(WINE, TARGETS)  # let libraries set themselves up
    random.seed(1)
    np.random.seed(1)
    before = state()
    parameters = jax.tree.map(np.array, PARAMETERS)
    model = FlaxWrapper(MODULE, PARAMETERS, input_shape=shape)
    Saliency(model)(WINE, TARGETS)
    if shape:
        GuidedBackprop(model)(WINE, TARGETS)
        model.truncate("Dense_0")(WINE)
        model.set_weights([weight * 2 for weight in model.get_weights()])
        model(WINE)
    after = state()
    for name, value in before.items():
        assert after[name] == value, name
    jax.tree.map(np.testing.assert_array_equal, parameters, PARAMETERS)
    assert MLP() == MODULE
    assert MODULE.scope is None


@pytest.mark.parametrize("shape", [None, (13,)])
@pytest.mark.parametrize(
    "methods",
    [
        [],
        [Saliency],
        [Saliency, GradientInput, IntegratedGradients],
        [GuidedBackprop],
        [DeconvNet, Saliency],
        [Occlusion],
    ],
)
def test_dropped_wrappers_are_collected(methods, shape):
    if shape is None and {GuidedBackprop, DeconvNet} & set(methods):
        methods = [Saliency]
    options = {Occlusion: {"patch_size": 2, "patch_stride": 2}}

    def use():
        model = FlaxWrapper(MODULE, PARAMETERS, input_shape=shape)
        for method in methods:
            method(model, **options.get(method, {}))(WINE, TARGETS)
        return weakref.ref(model)

    reference = use()
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("shape", [None, (13,)])
@pytest.mark.parametrize("module", [Waves(), MODULE])
def test_dropped_wrappers_are_collected_after_the_same_method_twice(module, shape):
    def use():
        model = FlaxWrapper(module, PARAMETERS, input_shape=shape)
        for _ in range(2):
            Saliency(model)(WINE, TARGETS)
        return weakref.ref(model)

    reference = use()
    if module is MODULE:  # of which TensorFlow's graphs do not tell that they are used
        FlaxWrapper(MODULE, PARAMETERS)
    gc.collect()
    assert reference() is None


def test_native_keras_models_are_not_collected():
    """Shows what Xplique's cache does; it fails with a release of Xplique that mends it."""
    inputs = tf.keras.Input((13,))
    model = tf.keras.Model(inputs, tf.keras.layers.Dense(3)(inputs))
    Saliency(model)(WINE, TARGETS)
    reference = weakref.ref(model)
    key = next(k for k, v in BlackBoxExplainer._cache_models.items() if v is model)
    del model, inputs
    gc.collect()
    assert reference() is not None
    del BlackBoxExplainer._cache_models[key]


def test_explainer_that_was_never_called_is_released_by_the_next_wrapper():
    Saliency(FlaxWrapper(MODULE, PARAMETERS))
    cached = [m for m in BlackBoxExplainer._cache_models.values() if isinstance(m, FlaxWrapper)]
    assert len(cached) == 1
    reference = weakref.ref(cached.pop())
    FlaxWrapper(MODULE, PARAMETERS)
    gc.collect()
    assert reference() is None


def test_entry_stays_while_a_constructor_is_at_work(monkeypatch):
    """Taking the entry out between the constructor's two steps would be a KeyError there."""
    inputs, outputs = object(), object()
    entry = CacheEntry(inputs, outputs)
    key = (id(inputs), id(outputs))
    inside, go_on = threading.Event(), threading.Event()

    def constructor(self):
        entry.announce()
        BlackBoxExplainer._cache_models[key] = "model"
        inside.set()
        go_on.wait(20)
        found.append(BlackBoxExplainer._cache_models[key])

    found = []
    monkeypatch.setattr(BlackBoxExplainer, "__init__", constructor)
    thread = threading.Thread(target=constructor, args=(None,))
    thread.start()
    inside.wait(20)
    entry.release()
    assert key in BlackBoxExplainer._cache_models
    go_on.set()
    thread.join()
    assert found == ["model"]
    entry.release()
    assert key not in BlackBoxExplainer._cache_models


def test_threads_explain_at_the_same_time():
    other = jax.tree.map(lambda leaf: leaf * 1.3, PARAMETERS)
    models = [FlaxWrapper(MODULE, PARAMETERS, input_shape=(13,)), FlaxWrapper(MODULE, other)]

    def maps():
        return [
            method(model, batch_size=4)(WINE, TARGETS).numpy()
            for method in (Saliency, GradientInput)
            for model in models
        ]

    expected = maps()
    assert np.abs(expected[0] - expected[1]).max() > 1e-4
    failures = []

    def work():
        try:
            for _ in range(10):
                for given, right in zip(maps(), expected, strict=True):
                    np.testing.assert_array_equal(given, right)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_autograph_stays_out_of_jax(capfd):
    @tf.function
    def call(x):
        return tf.keras.models.clone_model(model)(x) + model(x)

    model = FlaxWrapper(MODULE, PARAMETERS, input_shape=(13,))
    inner = tf.keras.Model(model.inputs, model.get_layer("Dense_0").output)
    tf.function(inner)(tf.constant(WINE))
    Saliency(model)(WINE, TARGETS)
    assert "AutoGraph" not in capfd.readouterr().err


@pytest.mark.parametrize("shape", [None, (13,)])
def test_autograph_converts_nothing_of_a_wrapper(shape):
    def doubled(x):
        return 2 * x

    @tf.function
    def call(x):
        return doubled(model(x)) + clone(x)

    model = FlaxWrapper(MODULE, PARAMETERS, input_shape=shape)
    clone = tf.keras.models.clone_model(model) if shape else model
    with mock.patch.object(api, "_convert_actual", wraps=api._convert_actual) as convert:
        call(tf.constant(WINE))
    assert [called.args[0] for called in convert.call_args_list] == [
        call.python_function,
        doubled,
    ]


@pytest.mark.parametrize("shape", [None, (13,)])
def test_settings_of_the_user_change_nothing(shape):
    expected = MODULE.apply(PARAMETERS, WINE)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = FlaxWrapper(MODULE, PARAMETERS, input_shape=shape)
        assert model(WINE).dtype == tf.float32
        np.testing.assert_allclose(model(WINE), expected, rtol=1e-6)
    finally:
        keras.config.set_dtype_policy(policy)
    with jax.disable_jit():
        model = FlaxWrapper(MODULE, PARAMETERS, input_shape=shape)
        np.testing.assert_allclose(model(WINE), expected, rtol=1e-6)
        if shape:
            chain = tf.keras.Model(model.inputs, model.outputs)
            np.testing.assert_allclose(chain(WINE), expected, rtol=1e-6)
    with jax.enable_x64(True):
        model = FlaxWrapper(MODULE, PARAMETERS, input_shape=shape)
        assert model(WINE).dtype == tf.float32
        np.testing.assert_allclose(model(WINE), expected, rtol=1e-6)
        np.testing.assert_allclose(
            Saliency(model)(WINE, TARGETS),
            np.abs(jax.grad(lambda x: (MODULE.apply(PARAMETERS, x) * TARGETS).sum())(WINE)),
            rtol=1e-4,
            atol=1e-7,
        )


def test_parameters_are_copied_without_compiling():
    def dense(parameters, x):
        return x @ parameters["kernel"] + parameters["bias"]

    first, second = ({"kernel": jnp.ones((n, n)), "bias": jnp.zeros(n)} for n in (7, 11))
    FlaxWrapper.from_function(dense, first, input_shape=(7,))  # which tries XLA's options, once
    with compilations() as seen:
        FlaxWrapper.from_function(dense, second, input_shape=(11,))
    assert seen == []


def aligned(leaf):
    """Return a copy where JAX would use the memory of an array of NumPy."""
    memory = np.empty(leaf.nbytes + 64, "uint8")
    start = -memory.ctypes.data % 64
    copy = memory[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
    copy[:] = leaf
    return copy


@pytest.mark.parametrize("shape", [None, (13,)])
def test_parameters_may_be_donated_or_overwritten_after_wrapping(shape):
    expected = MODULE.apply(PARAMETERS, WINE)
    donated = jax.tree.map(jax.numpy.copy, PARAMETERS)
    overwritten = jax.tree.map(aligned, PARAMETERS)
    wrapped = [FlaxWrapper(MODULE, each, input_shape=shape) for each in (donated, overwritten)]
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(donated)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    for leaf in jax.tree.leaves(overwritten):
        leaf[:] = 0
    for model in wrapped:
        np.testing.assert_allclose(model(WINE), expected, atol=1e-6)
