"""Passing arrays on a GPU. None is at hand: the CPU stands for it, where DLPack works alike."""

import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from xplique.attributions import GradCAM, GuidedBackprop, IntegratedGradients, Rise, Saliency

from tests.architectures import make_pair
from tests.equality_table import largest_difference, seed_everything
from xplique_flax import FlaxWrapper, gpu
from xplique_flax.bridge import Bridge

PAIR = make_pair("plain")


@pytest.fixture
def calls(monkeypatch):
    """Take the CPU for a GPU, and count the calls that go by NumPy, and those that do not."""
    monkeypatch.setattr(gpu, "_KIND", "CPU")
    counted = {}
    for name in ("execute", "execute_on_gpu"):
        function = getattr(Bridge, name)
        counted[name] = mock.Mock(side_effect=function)
        replacement = lambda bridge, *arrays, name=name: counted[name](bridge, *arrays)  # noqa: E731
        monkeypatch.setattr(Bridge, name, replacement)
    return lambda: (counted["execute"].call_count, counted["execute_on_gpu"].call_count)


def wrap():
    return FlaxWrapper(PAIR.module, PAIR.variables, input_shape=PAIR.inputs.shape[1:])


def test_arrays_keep_their_memory(monkeypatch):
    monkeypatch.setattr(gpu, "_KIND", "CPU")
    tensor = tf.random.stateless_normal((4, 5), [0, 0])
    array = gpu.to_jax(tensor, set())
    assert isinstance(array, jax.Array)
    assert array.unsafe_buffer_pointer() == gpu.to_jax(tensor, set()).unsafe_buffer_pointer()
    np.testing.assert_array_equal(array, tensor)
    doubled = array * 2
    back = gpu.to_tensorflow(doubled)
    assert (
        gpu.to_jax(back, set(jax.devices())).unsafe_buffer_pointer()
        == doubled.unsafe_buffer_pointer()
    )
    np.testing.assert_array_equal(back, doubled)


def test_tensor_on_the_host_goes_by_numpy():
    assert isinstance(gpu.to_jax(tf.ones(3), set()), np.ndarray)


def test_array_of_numpy_becomes_a_tensor():
    np.testing.assert_array_equal(gpu.to_tensorflow(np.arange(3.0)), tf.range(3.0))


def test_both_frameworks_have_to_see_the_gpu(monkeypatch):
    assert not gpu.is_shared()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not gpu.is_shared()
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [kind])
    assert gpu.is_shared()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not gpu.is_shared()


def test_outputs_and_gradients_are_the_same(calls):
    wrapped = wrap()
    tensor = tf.constant(PAIR.inputs)
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        outputs = wrapped(tensor)
        scores = outputs * PAIR.targets
    assert calls() == (0, 1)
    assert largest_difference(outputs, PAIR.apply(PAIR.inputs)) < 1e-5
    expected = jax.grad(lambda x: (PAIR.apply(x) * PAIR.targets).sum())(jnp.array(PAIR.inputs))
    assert largest_difference(tape.gradient(scores, tensor), expected) < 1e-5
    assert calls() == (0, 2)
    assert largest_difference(tf.function(wrapped)(tensor), outputs) < 1e-6
    assert calls() == (0, 3)


@pytest.mark.parametrize("method", [Saliency, IntegratedGradients, Rise, GradCAM, GuidedBackprop])
def test_explanations_are_the_same(method, calls, monkeypatch):
    explained = []
    for kind in ("CPU", "GPU"):
        monkeypatch.setattr(gpu, "_KIND", kind)
        seed_everything()
        explained.append(method(wrap())(PAIR.inputs, PAIR.targets))
    assert calls()[1] > 0
    assert largest_difference(*explained) < 1e-6


def test_gradient_does_not_compute_the_outputs_too(calls):
    Saliency(wrap())(PAIR.inputs, PAIR.targets)
    assert calls() == (0, 1)


def test_tape_may_be_recording_where_tensorflow_does_not_tell(monkeypatch):
    assert not gpu.is_gradient_asked()
    with tf.GradientTape() as tape:
        tape.watch(tf.ones(1))
        assert gpu.is_gradient_asked()
    monkeypatch.delattr(sys.modules["tensorflow.python.eager"], "record")
    monkeypatch.setitem(sys.modules, "tensorflow.python.eager.record", None)
    assert gpu.is_gradient_asked()
