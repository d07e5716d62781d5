"""The ways to show a Flax network to Xplique."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import numpy as np
import tensorflow as tf
from jax.experimental import jax2tf

from benchmarks.networks import Network
from xplique_flax import FlaxWrapper


def wrapped(network: Network, variables: Any) -> tf.keras.Model:
    """Return the network in a `FlaxWrapper`."""
    return FlaxWrapper(network.module, variables, input_shape=network.sample)


def computed_by_jax(network: Network, variables: Any) -> tf.keras.Model:
    """Return the network in a `FlaxWrapper` that calls JAX, however small the network is."""
    model = wrapped(network, variables)
    with mock.patch("xplique_flax.fused.dense_network", return_value=None):
        tf.function(model).get_concrete_function(tf.TensorSpec((None, *network.sample)))
    return model


def native_keras(network: Network, variables: Any) -> tf.keras.Model:
    """Return the Keras model with the same weights."""
    return network.twin(variables)


def eager(network: Network, variables: Any) -> tf.keras.Model:
    """Return the obvious wrapper: `jax.vjp` at each call, for which all of TensorFlow is eager."""

    @tf.custom_gradient
    def call(inputs: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        outputs, pullback = jax.vjp(lambda x: network.module.apply(variables, x), inputs.numpy())

        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            return tf.convert_to_tensor(np.asarray(pullback(upstream.numpy())[0]))

        return tf.convert_to_tensor(np.asarray(outputs)), gradient

    return _model(network, _Called(call, network.classes))


def converted(network: Network, variables: Any) -> tf.keras.Model:
    """Return the network as operations of TensorFlow, made by `jax2tf`."""
    call = jax2tf.convert(
        lambda x: network.module.apply(variables, x),
        polymorphic_shapes=["(batch, ...)"],
    )
    return _model(network, _Called(call, network.classes))


def flax_layer(network: Network, variables: Any) -> tf.keras.Model:
    """Return the network in the layer that Keras has for Flax."""
    return _model(network, tf.keras.layers.FlaxLayer(network.module, variables=variables))


def torch_wrapper(network: Network, variables: Any) -> tf.keras.Model:
    """Return the network of PyTorch in Xplique's wrapper, which makes all of TensorFlow eager."""
    from xplique.wrappers import TorchWrapper

    from benchmarks.torch_networks import TORCH_NETWORKS

    return TorchWrapper(TORCH_NETWORKS[network.name]().eval(), "cpu")


TOOLS: dict[str, Callable[[Network, Any], tf.keras.Model]] = {
    "xplique_flax": wrapped,
    "native Keras": native_keras,
    "jax2tf": converted,
    "FlaxLayer": flax_layer,
    "eager": eager,
}
if importlib.util.find_spec("torch"):
    TOOLS["TorchWrapper"] = torch_wrapper
NEED_EAGER = ("eager", "TorchWrapper")


@contextmanager
def as_needed_by(tool: str) -> Any:
    """Make TensorFlow eager for the wrappers that need it, and only for them."""
    tf.config.run_functions_eagerly(tool in NEED_EAGER)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


class _Called(tf.keras.layers.Layer):
    """A layer that calls a function of TensorFlow."""

    def __init__(self, function: Callable, classes: int) -> None:
        super().__init__()
        self._function = function
        self._classes = classes

    def call(self, inputs: Any) -> Any:
        return self._function(inputs)

    def compute_output_spec(self, inputs: Any) -> Any:
        return tf.keras.KerasTensor((None, self._classes))


def _model(network: Network, layer: tf.keras.layers.Layer) -> tf.keras.Model:
    inputs = tf.keras.Input(network.sample)
    return tf.keras.Model(inputs, layer(inputs))
