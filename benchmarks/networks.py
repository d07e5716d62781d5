"""The networks that are timed: in Flax, and native Keras twins with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from flax import linen as nn

from tests.weights import copy_weights

K = tf.keras
L = tf.keras.layers


class SmallCNN(nn.Module):
    """Six convolutions on 48 x 48 x 3."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for stage, features in enumerate((32, 64, 128)):
            for i in range(2):
                x = nn.relu(nn.Conv(features, (3, 3), name=f"conv_{stage}_{i}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10, name="logits")(x.mean((1, 2)))


def small_cnn_twin(size: int = 48) -> K.Model:
    x = inputs = K.Input((size, size, 3))
    for stage, features in enumerate((32, 64, 128)):
        for i in range(2):
            x = L.Conv2D(features, 3, padding="same", name=f"conv_{stage}_{i}")(x)
            x = L.ReLU(name=f"relu_{stage}_{i}")(x)
        x = L.MaxPooling2D(2, name=f"pool_{stage}")(x)
    return K.Model(inputs, L.Dense(10, name="logits")(L.GlobalAveragePooling2D(name="mean")(x)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1, and a shortcut."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        norm = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)
        y = nn.relu(
            norm(name="norm_1")(nn.Conv(self.features, (1, 1), use_bias=False, name="conv_1")(x))
        )
        y = nn.Conv(self.features, (3, 3), (self.stride,) * 2, 1, use_bias=False, name="conv_2")(y)
        y = nn.relu(norm(name="norm_2")(y))
        y = nn.Conv(4 * self.features, (1, 1), use_bias=False, name="conv_3")(y)
        y = norm(name="norm_3")(y)
        if x.shape != y.shape:
            strides = (self.stride,) * 2
            x = nn.Conv(4 * self.features, (1, 1), strides, use_bias=False, name="conv_0")(x)
            x = norm(name="norm_0")(x)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """The residual network of 50 layers, with the stride in the 3 x 3 convolutions."""

    depths: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(64, (7, 7), (2, 2), 3, use_bias=False, name="stem")(x)
        x = nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="norm")(x)
        x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                x = Bottleneck(64 * 2**stage, stride, name=f"block_{stage}_{i}")(x)
        return nn.Dense(1000, name="logits")(x.mean((1, 2)))


def resnet50_twin(depths: tuple[int, ...] = (3, 4, 6, 3)) -> K.Model:
    def convolution(x: Any, features: int, size: int, stride: int, names: tuple[str, str]) -> Any:
        if size > 1:
            x = L.ZeroPadding2D(size // 2)(x)
        x = L.Conv2D(features, size, stride, use_bias=False, name=names[0])(x)
        return L.BatchNormalization(epsilon=1e-5, name=names[1])(x)

    inputs = K.Input((224, 224, 3))
    x = L.ReLU()(convolution(inputs, 64, 7, 2, ("stem", "norm")))
    x = L.MaxPooling2D(3, 2)(L.ZeroPadding2D(1)(x))
    for stage, depth in enumerate(depths):
        features = 64 * 2**stage
        for i in range(depth):
            stride = 2 if stage and not i else 1
            names = [
                (f"block_{stage}_{i}.conv_{n}", f"block_{stage}_{i}.norm_{n}") for n in range(4)
            ]
            y = L.ReLU()(convolution(x, features, 1, 1, names[1]))
            y = L.ReLU()(convolution(y, features, 3, stride, names[2]))
            y = convolution(y, 4 * features, 1, 1, names[3])
            if i == 0:
                x = convolution(x, 4 * features, 1, stride, names[0])
            x = L.ReLU()(L.Add()([x, y]))
    return K.Model(inputs, L.Dense(1000, name="logits")(L.GlobalAveragePooling2D()(x)))


class Perceptron(nn.Module):
    """Two hidden layers on 30 columns of a table."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i in range(2):
            x = nn.relu(nn.Dense(64, name=f"dense_{i}")(x))
        return nn.Dense(2, name="logits")(x)


def perceptron_twin() -> K.Model:
    x = inputs = K.Input((30,))
    for i in range(2):
        x = L.ReLU(name=f"relu_{i}")(L.Dense(64, name=f"dense_{i}")(x))
    return K.Model(inputs, L.Dense(2, name="logits")(x))


class SmallViT(nn.Module):
    """Four blocks of attention over 64 patches of 32 x 32 x 3."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(96, (4, 4), (4, 4), name="patches")(x).reshape(-1, 64, 96)
        x = x + self.param("places", nn.initializers.normal(0.02), (1, 64, 96))
        for i in range(4):
            y = nn.LayerNorm(name=f"norm_{i}_0")(x)
            x = x + nn.MultiHeadDotProductAttention(4, name=f"attention_{i}")(y, y)
            y = nn.Dense(192, name=f"wide_{i}")(nn.LayerNorm(name=f"norm_{i}_1")(x))
            x = x + nn.Dense(96, name=f"narrow_{i}")(nn.relu(y))
        return nn.Dense(10, name="logits")(nn.LayerNorm(name="norm")(x).mean(1))


class Places(L.Layer):
    """A value for each place, which is learned."""

    def build(self, shape: tuple) -> None:
        self.values = self.add_weight(shape=(1, *shape[1:]), name="places")

    def call(self, x: Any) -> Any:
        return x + self.values


def small_vit_twin() -> K.Model:
    inputs = K.Input((32, 32, 3))
    x = L.Reshape((64, 96))(L.Conv2D(96, 4, 4, name="patches")(inputs))
    x = Places(name="places")(x)
    for i in range(4):
        y = L.LayerNormalization(epsilon=1e-6, name=f"norm_{i}_0")(x)
        x = L.Add()([x, L.MultiHeadAttention(4, 24, name=f"attention_{i}")(y, y)])
        y = L.Dense(192, name=f"wide_{i}")(
            L.LayerNormalization(epsilon=1e-6, name=f"norm_{i}_1")(x)
        )
        x = L.Add()([x, L.Dense(96, name=f"narrow_{i}")(L.ReLU()(y))])
    x = L.GlobalAveragePooling1D()(L.LayerNormalization(epsilon=1e-6, name="norm")(x))
    return K.Model(inputs, L.Dense(10, name="logits")(x))


@dataclass
class Network:
    """A network in Flax, what it takes, and the function that makes its twin."""

    name: str
    module: nn.Module
    sample: tuple[int, ...]
    classes: int
    make_twin: Callable[[], K.Model]

    def variables(self) -> Any:
        """Draw parameters; what is computed with them costs the same as with trained ones."""
        inputs = np.zeros((1, *self.sample), "float32")
        return jax.jit(self.module.init)(jax.random.key(0), inputs)

    def data(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw inputs, and give targets for them."""
        inputs = np.random.default_rng(0).normal(size=(number, *self.sample))
        classes = np.arange(number) % self.classes
        return inputs.astype("float32"), np.eye(self.classes, dtype="float32")[classes]

    def twin(self, variables: Any) -> K.Model:
        twin = self.make_twin()
        copy_weights(variables, twin)
        return twin


NETWORKS = {
    network.name: network
    for network in (
        Network("cnn", SmallCNN(), (48, 48, 3), 10, small_cnn_twin),
        Network("resnet", ResNet50(), (224, 224, 3), 1000, resnet50_twin),
        Network("mlp", Perceptron(), (30,), 2, perceptron_twin),
        Network("vit", SmallViT(), (32, 32, 3), 10, small_vit_twin),
    )
}
