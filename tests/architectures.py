"""Flax models, each with a native Keras twin that has the same weights, and inputs for both.

The layers of a twin bear the names that `FlaxWrapper` promises: the paths of the Flax modules. So a
twin's weights are found by name, and a layer is asked of both models in the same way.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import tensorflow as tf
from flax import linen as nn
from flax import nnx
from sklearn.datasets import (
    load_diabetes,
    load_digits,
    load_sample_images,
    load_wine,
)

from tests.weights import copy_weights

K = tf.keras
L = tf.keras.layers
ops = tf.keras.ops

SEED = 8  # of the parameters: with it, no layer of a model is silent for all samples
NB_SAMPLES = 3
NB_BOXES = 16  # of the detection model: a grid of 4 x 4 cells


# ------------------------------------------------------------------------------------------ inputs


def one_hot(labels: Any, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[np.asarray(labels)]


def digits(number: int = NB_SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Scans of handwritten digits, 8 x 8 x 1, and their labels."""
    data = load_digits()
    return (data.images[:number, ..., None] / 16).astype(np.float32), one_hot(
        data.target[:number], 10
    )


def photographs(number: int = NB_SAMPLES, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Parts of two colour photographs, reduced eightfold, and an arbitrary class out of five."""
    images = load_sample_images().images
    rng = np.random.default_rng(0)
    crops = []
    for index in range(number):
        image = images[index % len(images)] / 255
        top, left = (rng.integers(side - 8 * size) for side in image.shape[:2])
        crop = image[top : top + 8 * size, left : left + 8 * size]
        crops.append(crop.reshape(size, 8, size, 8, 3).mean((1, 3)))
    return np.array(crops, np.float32), one_hot(np.arange(number) % 5, 5)


def digit_rows(number: int = NB_SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Digits read from top to bottom: eight steps in time of eight values each."""
    images, labels = digits(number)
    return images[..., 0], labels


def _standardised(rows: np.ndarray) -> np.ndarray:
    return ((rows - rows.mean(0)) / rows.std(0)).astype(np.float32)


def wines(number: int = NB_SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Chemical analyses of wines, and their cultivar."""
    data = load_wine()
    chosen = np.arange(number) * 60 % len(data.data)
    return _standardised(data.data)[chosen], one_hot(data.target[chosen], 3)


def patients(number: int = NB_SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Baseline measurements of diabetes patients, and the outputs to explain, with a sign."""
    rows = _standardised(load_diabetes().data)[:number]
    signs = np.array([[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 1, -1]], np.float32)
    return rows, signs[np.arange(number) % 3]


def photographs_with_zones(number: int = NB_SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Photographs, and the class and zone of each whose segmentation is to be explained."""
    images, _ = photographs(number)
    zones = np.zeros((*images.shape[:3], 4), np.float32)
    for index in range(number):
        zones[index, 3 + index : 11 + index, 4:12, index % 4] = 1
    return images, zones


def photographs_with_boxes(number: int = NB_SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Photographs, and two reference boxes for each, padded with zeros to the number of boxes."""
    images, _ = photographs(number)
    boxes = np.zeros((number, NB_BOXES, 8), np.float32)
    for index in range(number):
        boxes[index, 0] = [2.3, 3.1, 9.7, 8.9 + index, 1, 1, 0, 0]
        boxes[index, 1] = [5.6 + index, 6.2, 12.4, 13.8, 1, 0, 1, 0]
    return images, boxes


# ------------------------------------------------------------------------------- the pairs' layers


def conv(name: str, features: int, size: int = 3, **options: Any) -> K.layers.Layer:
    return L.Conv2D(features, size, padding="same", name=name, **options)


def batch_norm(name: str) -> K.layers.Layer:
    return L.BatchNormalization(epsilon=1e-5, name=name)


def layer_norm(name: str) -> K.layers.Layer:
    return L.LayerNormalization(epsilon=1e-6, name=name)


class Constant(L.Layer):
    """Adds a learnt array to its input: a positional embedding."""

    def build(self, input_shape):
        self.embedding = self.add_weight(shape=input_shape[1:], name="embedding")

    def call(self, inputs):
        return inputs + self.embedding


# ----------------------------------------------------------------------------- models for pictures


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(16)(x))
        return nn.softmax(nn.Dense(10)(x))


def plain_twin() -> K.Model:
    inputs = K.Input((8, 8, 1))
    x = L.ReLU(name="relu")(conv("Conv_0", 6)(inputs))
    x = L.MaxPooling2D(2)(x)
    x = L.ReLU(name="relu_1")(conv("Conv_1", 8)(x))
    x = L.ReLU(name="relu_2")(L.Dense(16, name="Dense_0")(L.Flatten()(x)))
    return K.Model(inputs, L.Softmax()(L.Dense(10, name="Dense_1")(x)))


class Block(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train)(x)

        y = nn.relu(norm(nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)))
        y = norm(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if self.stride > 1:
            x = norm(nn.Conv(self.features, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + y)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(6, (3, 3))(x)))
        x = Block(6)(x, train)
        x = Block(8, 2)(x, train)
        return nn.Dense(5)(x.mean((1, 2)))


def residual_twin() -> K.Model:
    def block(name: str, x: Any, features: int, stride: int = 1) -> Any:
        y = conv(f"{name}.Conv_0", features, strides=stride, use_bias=False)(x)
        y = L.ReLU(name=f"{name}.relu")(batch_norm(f"{name}.BatchNorm_0")(y))
        y = conv(f"{name}.Conv_1", features, use_bias=False)(y)
        y = batch_norm(f"{name}.BatchNorm_1")(y)
        if stride > 1:
            x = conv(f"{name}.Conv_2", features, 1, strides=stride, use_bias=False)(x)
            x = batch_norm(f"{name}.BatchNorm_2")(x)
        return L.ReLU(name=f"{name}.relu_1")(L.Add()([x, y]))

    inputs = K.Input((16, 16, 3))
    x = L.ReLU(name="relu")(batch_norm("BatchNorm_0")(conv("Conv_0", 6)(inputs)))
    x = block("Block_1", block("Block_0", x, 6), 8, 2)
    return K.Model(inputs, L.Dense(5, name="Dense_0")(L.GlobalAveragePooling2D()(x)))


class Encoder(nn.Module):
    def setup(self):
        self.first = nn.Conv(6, (3, 3))
        self.second = nn.Conv(6, (3, 3), padding="VALID")

    def __call__(self, x):
        return nn.relu(self.second(nn.relu(self.first(x))))


class Head(nn.Module):
    def setup(self):
        self.hidden = [nn.Dense(12), nn.Dense(10)]

    def __call__(self, x):
        return self.hidden[1](nn.relu(self.hidden[0](x)))


class Nested(nn.Module):
    def setup(self):
        self.encoder = Encoder()
        self.head = Head()

    def __call__(self, x):
        x = nn.avg_pool(self.encoder(x), (2, 2), strides=(2, 2))
        return self.head(x.reshape((x.shape[0], -1)))


def nested_twin() -> K.Model:
    inputs = K.Input((8, 8, 1))
    x = L.ReLU(name="encoder.relu")(conv("encoder.first", 6)(inputs))
    x = L.ReLU(name="encoder.relu_1")(L.Conv2D(6, 3, name="encoder.second")(x))
    x = L.Flatten()(L.AveragePooling2D(2)(x))
    x = L.ReLU(name="head.relu")(L.Dense(12, name="head.hidden_0")(x))
    return K.Model(inputs, L.Dense(10, name="head.hidden_1")(x))


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="first")(x))
        again = nn.Conv(6, (3, 3), name="again")
        x = nn.relu(again(x))
        x = nn.relu(again(x))
        return nn.Dense(10, name="last")(x.mean((1, 2)))


def shared_twin() -> K.Model:
    inputs = K.Input((8, 8, 1))
    again = conv("again", 6)
    x = L.ReLU(name="relu")(conv("first", 6)(inputs))
    x = L.ReLU(name="relu_1")(again(x))
    x = L.ReLU(name="relu_2")(again(x))
    return K.Model(inputs, L.Dense(10, name="last")(L.GlobalAveragePooling2D()(x)))


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="stem")(x))
        one = nn.relu(nn.Conv(3, (1, 1), name="one")(x))
        three = nn.relu(nn.Conv(4, (3, 3), name="three")(x))
        pooled = nn.Conv(2, (1, 1), name="pool")(nn.max_pool(x, (3, 3), padding="SAME"))
        x = jnp.concatenate([one, three, nn.relu(pooled)], axis=-1)
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, name="join")(x))
        return nn.softmax(nn.Dense(5, name="last")(x.mean((1, 2))))


def branches_twin() -> K.Model:
    inputs = K.Input((16, 16, 3))
    x = L.ReLU(name="relu")(conv("stem", 6)(inputs))
    one = L.ReLU(name="relu_1")(conv("one", 3, 1)(x))
    three = L.ReLU(name="relu_2")(conv("three", 4)(x))
    pooled = conv("pool", 2, 1)(L.MaxPooling2D(3, strides=1, padding="same")(x))
    x = L.Concatenate()([one, three, L.ReLU(name="relu_3")(pooled)])
    x = L.ReLU(name="relu_4")(conv("join", 6, strides=2)(x))
    x = L.Dense(5, name="last")(L.GlobalAveragePooling2D()(x))
    return K.Model(inputs, L.Softmax()(x))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions with ReLU6, as in MobileNet."""

    @nn.compact
    def __call__(self, x, train):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train)(x)

        # The factor takes the activations beyond six, where ReLU6 is flat.
        x = nn.relu6(norm(nn.Conv(6, (3, 3), strides=2, use_bias=False)(x)) * 4)
        for features in (8, 10):
            x = nn.Conv(x.shape[-1], (3, 3), feature_group_count=x.shape[-1], use_bias=False)(x)
            x = nn.relu6(norm(x) * 4)
            x = nn.relu6(norm(nn.Conv(features, (1, 1), use_bias=False)(x)))
        return nn.Dense(5)(x.mean((1, 2)))


def separable_twin() -> K.Model:
    def relu6(index: int) -> K.layers.Layer:
        return L.ReLU(max_value=6, name=f"relu_{index}" if index else "relu")

    inputs = K.Input((16, 16, 3))
    x = batch_norm("BatchNorm_0")(conv("Conv_0", 6, strides=2, use_bias=False)(inputs))
    x = relu6(0)(L.Rescaling(4)(x))
    for index, features in ((1, 8), (3, 10)):
        x = L.DepthwiseConv2D(3, padding="same", use_bias=False, name=f"Conv_{index}")(x)
        x = relu6(index)(L.Rescaling(4)(batch_norm(f"BatchNorm_{index}")(x)))
        x = conv(f"Conv_{index + 1}", features, 1, use_bias=False)(x)
        x = relu6(index + 1)(batch_norm(f"BatchNorm_{index + 1}")(x))
    return K.Model(inputs, L.Dense(5, name="Dense_0")(L.GlobalAveragePooling2D()(x)))


class Patches(nn.Module):
    """Folds the patches of a picture into the batch, and unfolds them again."""

    @nn.compact
    def __call__(self, x):
        n = x.shape[0]
        x = x.reshape((n, 2, 8, 2, 8, 3)).transpose((0, 1, 3, 2, 4, 5)).reshape((-1, 8, 8, 3))
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.relu(nn.Dense(4)(x.reshape((-1, 6))).reshape((-1, 8, 8, 4)))
        return nn.Dense(5)(x.mean((1, 2)).reshape((n, 16)))


def patches_twin() -> K.Model:
    inputs = K.Input((16, 16, 3))
    x = ops.transpose(ops.reshape(inputs, (-1, 2, 8, 2, 8, 3)), (0, 1, 3, 2, 4, 5))
    x = L.ReLU(name="relu")(conv("Conv_0", 6)(ops.reshape(x, (-1, 8, 8, 3))))
    x = L.Dense(4, name="Dense_0")(ops.reshape(x, (-1, 6)))
    x = L.ReLU(name="relu_1")(ops.reshape(x, (-1, 8, 8, 4)))
    x = ops.reshape(ops.mean(x, axis=(1, 2)), (-1, 16))
    return K.Model(inputs, L.Dense(5, name="Dense_1")(x))


class Transformer(nn.Module):
    """A vision transformer: patches as tokens, attention, and no convolution at all."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape((x.shape[0], 4, 2, 4, 2, 1)).transpose((0, 1, 3, 2, 4, 5))
        x = nn.Dense(12)(x.reshape((x.shape[0], 16, 4)))
        x = x + nn.Embed(16, 12)(jnp.arange(16))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=3)(y)
        y = nn.Dense(24)(nn.LayerNorm()(x))
        x = x + nn.Dense(12)(nn.gelu(y))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def transformer_twin() -> K.Model:
    inputs = K.Input((8, 8, 1))
    x = ops.transpose(ops.reshape(inputs, (-1, 4, 2, 4, 2, 1)), (0, 1, 3, 2, 4, 5))
    x = Constant(name="Embed_0")(L.Dense(12, name="Dense_0")(ops.reshape(x, (-1, 16, 4))))
    y = layer_norm("LayerNorm_0")(x)
    attention = L.MultiHeadAttention(3, 4, name="MultiHeadDotProductAttention_0")
    x = L.Add()([x, attention(y, y)])
    y = L.Dense(24, name="Dense_1")(layer_norm("LayerNorm_1")(x))
    x = L.Add()([x, L.Dense(12, name="Dense_2")(ops.gelu(y, approximate=True))])
    x = L.GlobalAveragePooling1D()(layer_norm("LayerNorm_2")(x))
    return K.Model(inputs, L.Dense(10, name="Dense_3")(x))


class Segmenter(nn.Module):
    """An encoder and a decoder with both ways to enlarge, and a connection between them."""

    @nn.compact
    def __call__(self, x):
        fine = nn.relu(nn.Conv(6, (3, 3), name="fine")(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="coarse")(fine))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="coarser")(x))
        x = nn.relu(nn.ConvTranspose(6, (3, 3), strides=(2, 2), name="up")(x))
        x = jax.image.resize(x, (x.shape[0], 16, 16, 6), "bilinear")
        x = jnp.concatenate([x, fine], axis=-1)
        return nn.softmax(nn.Conv(4, (1, 1), name="classes")(x))


def segmenter_twin() -> K.Model:
    inputs = K.Input((16, 16, 3))
    fine = L.ReLU(name="relu")(conv("fine", 6)(inputs))
    x = L.ReLU(name="relu_1")(conv("coarse", 8, strides=2)(fine))
    x = L.ReLU(name="relu_2")(conv("coarser", 8, strides=2)(x))
    x = L.ReLU(name="relu_3")(L.Conv2DTranspose(6, 3, strides=2, padding="same", name="up")(x))
    x = L.Concatenate()([L.UpSampling2D(2, interpolation="bilinear")(x), fine])
    return K.Model(inputs, L.Softmax()(conv("classes", 4, 1)(x)))


# The centres of the cells in which the detection model looks for an object.
CELLS = (np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(1, 16, 2) * 4 + 2.0).astype(
    np.float32
)


class Detector(nn.Module):
    """One box for each cell of a grid: corners, presence of an object and three classes."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.Conv(8, (1, 1), name="boxes")(x).reshape((x.shape[0], NB_BOXES, 8))
        centre = CELLS + 2 * nn.tanh(x[..., :2])
        half = 1 + 4 * nn.sigmoid(x[..., 2:4])
        corners = [centre - half, centre + half]
        return jnp.concatenate([*corners, nn.sigmoid(x[..., 4:5]), nn.softmax(x[..., 5:])], axis=-1)


def detector_twin() -> K.Model:
    inputs = K.Input((16, 16, 3))
    x = L.ReLU(name="relu")(conv("Conv_0", 8, strides=2)(inputs))
    x = L.ReLU(name="relu_1")(conv("Conv_1", 8, strides=2)(x))
    x = L.Reshape((NB_BOXES, 8))(conv("boxes", 8, 1)(x))
    centre = ops.tanh(x[..., :2]) * 2 + CELLS
    half = ops.sigmoid(x[..., 2:4]) * 4 + 1
    corners = [centre - half, centre + half]
    return K.Model(
        inputs, L.Concatenate()([*corners, ops.sigmoid(x[..., 4:5]), ops.softmax(x[..., 5:])])
    )


# -------------------------------------------------------------- models for time series and tables


class Series(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3,))(x))
        x = nn.max_pool(x, (2,), strides=(2,))
        x = nn.relu(nn.Conv(8, (3,))(x))
        return nn.softmax(nn.Dense(10)(x.mean(1)))


def series_twin() -> K.Model:
    inputs = K.Input((8, 8))
    x = L.ReLU(name="relu")(L.Conv1D(6, 3, padding="same", name="Conv_0")(inputs))
    x = L.MaxPooling1D(2)(x)
    x = L.ReLU(name="relu_1")(L.Conv1D(8, 3, padding="same", name="Conv_1")(x))
    x = L.Dense(10, name="Dense_0")(L.GlobalAveragePooling1D()(x))
    return K.Model(inputs, L.Softmax()(x))


class TimeMajor(nn.Module):
    """Puts time before the batch, as models that walk through time do."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8)(x.transpose((1, 0, 2))))
        weights = self.param("weights", nn.initializers.normal(1.0), (8, 1, 1))
        x = nn.relu(nn.Dense(8)((weights * x).sum(0)))
        return nn.Dense(10)(x)


class Weighting(L.Layer):
    """Multiplies its input with learnt weights, one for each step in time."""

    def build(self, input_shape):
        self.weights_in_time = self.add_weight(shape=(8, 1, 1), name="weights")

    def call(self, inputs):
        return inputs * self.weights_in_time


def time_major_twin() -> K.Model:
    inputs = K.Input((8, 8))
    x = L.ReLU(name="relu")(L.Dense(8, name="Dense_0")(ops.transpose(inputs, (1, 0, 2))))
    x = ops.sum(Weighting(name="weights")(x), axis=0)
    x = L.ReLU(name="relu_1")(L.Dense(8, name="Dense_1")(x))
    return K.Model(inputs, L.Dense(10, name="Dense_2")(x))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(6, name="cell"))(x)
        return nn.Dense(10)(x[:, -1])


def recurrent_twin() -> K.Model:
    inputs = K.Input((8, 8))
    return K.Model(inputs, L.Dense(10, name="Dense_0")(L.LSTM(6, name="cell")(inputs)))


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        x = nn.tanh(nn.Dense(12)(x))
        return nn.Dense(4)(x)


def perceptron_twin() -> K.Model:
    inputs = K.Input((10,))
    x = L.ReLU(name="relu")(L.Dense(16, name="Dense_0")(inputs))
    x = L.Activation("tanh")(L.Dense(12, name="Dense_1")(x))
    return K.Model(inputs, L.Dense(4, name="Dense_2")(x))


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.softmax(nn.Dense(3)(x))


def normalised_twin() -> K.Model:
    inputs = K.Input((13,))
    x = batch_norm("BatchNorm_0")(L.Dense(16, name="Dense_0")(inputs))
    x = L.Dropout(0.5)(L.ReLU(name="relu")(x))
    return K.Model(inputs, L.Softmax()(L.Dense(3, name="Dense_1")(x)))


class Step(nn.Module):
    """A block in the form that `nn.scan` takes."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.Conv(4, (3, 3), name="conv")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(y))
        return x + nn.Dense(4, name="dense")(y), None


class Stack(nn.Module):
    """Blocks in a scan, recomputed in the backward pass; one of them is then looped over."""

    @nn.compact
    def __call__(self, x):
        axes, rngs = {"params": 0, "batch_stats": 0}, {"params": True}
        blocks = nn.scan(nn.remat(Step), variable_axes=axes, split_rngs=rngs, length=3)
        x, _ = blocks(name="blocks")(nn.Conv(4, (3, 3), name="stem")(x), None)
        again = nn.scan(
            Step,
            variable_broadcast=("params", "batch_stats"),
            split_rngs={"params": False},
            length=2,
        )
        x, _ = again(name="again")(x, None)
        return nn.Dense(10, name="last")(x.mean((1, 2)))


def stack_twin() -> K.Model:
    def block(x, relu, convolution, norm, dense):
        return L.Add()([x, dense(L.ReLU(name=relu)(norm(convolution(x))))])

    def layers(name):
        return conv(f"{name}.conv", 4), batch_norm(f"{name}.norm"), L.Dense(4, name=f"{name}.dense")

    inputs = K.Input((8, 8, 1))
    x = conv("stem", 4)(inputs)
    for name in ("blocks.0", "blocks.1", "blocks.2"):
        x = block(x, f"{name}.relu", *layers(name))
    again = layers("again")
    x = block(block(x, "again.relu", *again), "again.relu_1", *again)
    return K.Model(inputs, L.Dense(10, name="last")(L.GlobalAveragePooling2D()(x)))


# ------------------------------------------------------------------------------------ NNX modules


class NNXBlock(nnx.Module):
    def __init__(self, features: int, rngs: nnx.Rngs):
        self.first = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.second = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm(self.first(x)))
        return nnx.relu(x + self.dropout(self.second(y)))


class NNXStack(nnx.Module):
    """Blocks whose parameters are stacked along a first axis, one after the other."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            return NNXBlock(4, rngs)

        self.stem = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.blocks = stack(rngs)
        self.last = nnx.Linear(4, 10, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return block(x)

        return self.last(forward(self.stem(x), self.blocks).mean((1, 2)))


def nnx_stack_twin() -> K.Model:
    inputs = K.Input((8, 8, 1))
    x = conv("stem", 4)(inputs)
    for name in ("blocks.0", "blocks.1", "blocks.2"):
        y = batch_norm(f"{name}.norm")(conv(f"{name}.first", 4, use_bias=False)(x))
        y = conv(f"{name}.second", 4)(L.ReLU(name=f"{name}.relu")(y))
        x = L.ReLU(name=f"{name}.relu_1")(L.Add()([x, y]))
    return K.Model(inputs, L.Dense(10, name="last")(L.GlobalAveragePooling2D()(x)))


class NNXResidual(nnx.Module):
    """In training mode, as a new module is; one convolution is called twice."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.again = nnx.Conv(6, 6, (3, 3), rngs=rngs)
        self.blocks = nnx.List([NNXBlock(6, rngs) for _ in range(2)])
        self.head = nnx.Sequential(
            nnx.Linear(6, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 5, rngs=rngs)
        )

    def __call__(self, x):
        x = nnx.relu(self.again(nnx.relu(self.again(self.stem(x)))))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def nnx_residual_twin() -> K.Model:
    inputs = K.Input((16, 16, 3))
    again = conv("again", 6)
    x = L.ReLU(name="relu")(again(conv("stem", 6)(inputs)))
    x = L.ReLU(name="relu_1")(again(x))
    for name in ("blocks.0", "blocks.1"):
        y = batch_norm(f"{name}.norm")(conv(f"{name}.first", 6, use_bias=False)(x))
        y = conv(f"{name}.second", 6)(L.ReLU(name=f"{name}.relu")(y))
        x = L.ReLU(name=f"{name}.relu_1")(L.Add()([x, y]))
    x = L.Dense(8, name="head.layers.0")(L.GlobalAveragePooling2D()(x))
    x = L.ReLU(name="head.relu")(x)
    return K.Model(inputs, L.Dense(5, name="head.layers.2")(x))


class NNXSeries(nnx.Module):
    """A transformer for series, with a learned place for each step."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(8, 12, rngs=rngs)
        self.place = nnx.Param(jnp.zeros((8, 12)))
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)
        self.last = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x) + self.place[...]
        x = x + self.attention(self.norm(x))
        return self.last(x.mean(1))


def nnx_series_twin() -> K.Model:
    inputs = K.Input((8, 8))
    x = Constant(name="place")(L.Dense(12, name="embed")(inputs))
    y = layer_norm("norm")(x)
    x = L.Add()([x, L.MultiHeadAttention(3, 4, name="attention")(y, y)])
    return K.Model(inputs, L.Dense(10, name="last")(L.GlobalAveragePooling1D()(x)))


# --------------------------------------------------------------------------------------- the pairs

WITH_LAYERS_OF_CONVOLUTION = ("GradCAM", "GradCAMPP", "FEM")
FOR_PICTURES = ("SobolAttributionMethod", "HsicAttributionMethod")


@dataclass(frozen=True)
class Architecture:
    """How a pair is made.

    `convolutions` are layers to pass as `conv_layer`, `inapplicable` the attribution methods which
    Xplique cannot run on the Keras twin, and `one_to_one` says that each layer of the twin that has
    weights is one Flax module with the same arrays.
    """

    module: nn.Module | nnx.Module
    twin: Callable[[], K.Model]
    data: Callable[[int], tuple[np.ndarray, np.ndarray]]
    convolutions: tuple[str, ...] = ()
    inapplicable: tuple[str, ...] = ()
    one_to_one: bool = True
    operator: str | None = None
    apply_kwargs: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES = {
    "plain": Architecture(
        Plain(),
        plain_twin,
        digits,
        convolutions=("Conv_0", "Conv_1", "relu", "relu_1"),
        operator="classification",
    ),
    "residual": Architecture(
        Residual(),
        residual_twin,
        photographs,
        convolutions=("Conv_0", "Block_0.Conv_1", "Block_1.Conv_0", "Block_1.BatchNorm_1"),
        apply_kwargs={"train": False},
    ),
    "nested": Architecture(
        Nested(), nested_twin, digits, convolutions=("encoder.first", "encoder.relu_1")
    ),
    "shared": Architecture(Shared(), shared_twin, digits, convolutions=("first", "again")),
    "branches": Architecture(
        Branches(), branches_twin, photographs, convolutions=("stem", "one", "pool", "join")
    ),
    "separable": Architecture(
        Separable(),
        separable_twin,
        photographs,
        convolutions=("Conv_0", "Conv_1", "Conv_2"),
        one_to_one=False,  # a depthwise kernel has its axes in another order in Keras
        apply_kwargs={"train": False},
    ),
    "patches": Architecture(Patches(), patches_twin, photographs, convolutions=("Conv_0",)),
    "transformer": Architecture(
        Transformer(),
        transformer_twin,
        digits,
        inapplicable=WITH_LAYERS_OF_CONVOLUTION,
        one_to_one=False,
    ),
    "segmenter": Architecture(
        Segmenter(),
        segmenter_twin,
        photographs_with_zones,
        convolutions=("fine", "coarser", "up"),
        one_to_one=False,  # the kernel of a transposed convolution is flipped in Keras
        operator="semantic segmentation",
    ),
    "detector": Architecture(
        Detector(),
        detector_twin,
        photographs_with_boxes,
        convolutions=("Conv_0", "boxes"),
        operator="object detection",
    ),
    "series": Architecture(
        Series(),
        series_twin,
        digit_rows,
        convolutions=(),
        inapplicable=(*WITH_LAYERS_OF_CONVOLUTION, *FOR_PICTURES),
    ),
    "time_major": Architecture(
        TimeMajor(),
        time_major_twin,
        digit_rows,
        inapplicable=(*WITH_LAYERS_OF_CONVOLUTION, *FOR_PICTURES),
        one_to_one=False,
    ),
    "recurrent": Architecture(
        Recurrent(),
        recurrent_twin,
        digit_rows,
        inapplicable=(*WITH_LAYERS_OF_CONVOLUTION, *FOR_PICTURES),
        one_to_one=False,
    ),
    "perceptron": Architecture(
        Perceptron(),
        perceptron_twin,
        patients,
        inapplicable=(*WITH_LAYERS_OF_CONVOLUTION, *FOR_PICTURES),
        operator="regression",
    ),
    "normalised": Architecture(
        Normalised(),
        normalised_twin,
        wines,
        inapplicable=(*WITH_LAYERS_OF_CONVOLUTION, *FOR_PICTURES),
        apply_kwargs={"train": False},
    ),
    "stack": Architecture(
        Stack(),
        stack_twin,
        digits,
        convolutions=("stem", "blocks.0.conv", "blocks.2.norm", "again.conv"),
        one_to_one=False,  # three layers of the twin are slices of one array
    ),
    "nnx_stack": Architecture(
        NNXStack(nnx.Rngs(0)),
        nnx_stack_twin,
        digits,
        convolutions=("blocks.0.second", "blocks.2.relu_1"),
        one_to_one=False,
    ),
    "nnx_residual": Architecture(
        NNXResidual(nnx.Rngs(0)),
        nnx_residual_twin,
        photographs,
        convolutions=("stem", "again", "blocks.0.second", "blocks.1.relu"),
    ),
    "nnx_series": Architecture(
        NNXSeries(nnx.Rngs(0)),
        nnx_series_twin,
        digit_rows,
        inapplicable=(*WITH_LAYERS_OF_CONVOLUTION, *FOR_PICTURES),
        one_to_one=False,
    ),
}


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name in ("scale", "var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif name == "kernel":
        values = rng.normal(0, 2 / np.sqrt(max(np.prod(shape[:-1]), 1)), shape)
    else:
        values = rng.normal(0, 0.3, shape)
    return values.astype(np.float32)


def random_parameters(module: nn.Module, inputs: np.ndarray, **apply_kwargs: Any) -> dict:
    """Parameters of which none is zero or one, as those of a trained model."""
    rng = np.random.default_rng(SEED)
    shapes = jax.eval_shape(
        functools.partial(module.init, **apply_kwargs), jax.random.key(0), inputs
    )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _draw(rng, path[-1].key, leaf.shape), shapes
    )


def give_random_parameters(module: nnx.Module) -> dict:
    """Set such parameters in an NNX module, and return them as Linen would have them."""
    rng = np.random.default_rng(SEED)
    variables: dict[str, Any] = {}
    for kind, collection in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
        for path, variable in nnx.to_flat_state(nnx.state(module, kind)):
            array = _draw(rng, str(path[-1]), variable.shape)
            holder: Any = module
            inner = variables.setdefault(collection, {})
            for name in path[:-1]:
                holder = holder[name] if isinstance(name, int) else getattr(holder, name)
                inner = inner.setdefault(str(name), {})
            getattr(holder, path[-1])[...] = array
            inner[path[-1]] = array
    return variables


@dataclass
class Pair:
    """A Flax model, its Keras twin with the same weights, and samples with targets for both."""

    name: str
    architecture: Architecture
    variables: dict
    twin: K.Model
    inputs: np.ndarray
    targets: np.ndarray

    @property
    def module(self) -> Any:
        return self.architecture.module

    @property
    def is_nnx(self) -> bool:
        return isinstance(self.module, nnx.Module)

    def apply(self, inputs: Any) -> jax.Array:
        if self.is_nnx:
            module = nnx.clone(self.module)
            module.eval()
            return module(inputs)
        return self.module.apply(self.variables, inputs, **self.architecture.apply_kwargs)

    @functools.cached_property
    def wrapped(self) -> K.Model:
        from xplique_flax import FlaxWrapper

        return FlaxWrapper(
            self.module,
            None if self.is_nnx else self.variables,
            input_shape=self.inputs.shape[1:],
            apply_kwargs=dict(self.architecture.apply_kwargs),
        )


@functools.cache
def make_pair(name: str) -> Pair:
    """Build a pair once for all tests."""
    architecture = ARCHITECTURES[name]
    inputs, targets = architecture.data(NB_SAMPLES)
    if isinstance(architecture.module, nnx.Module):
        variables = give_random_parameters(architecture.module)
    else:
        variables = random_parameters(architecture.module, inputs, **architecture.apply_kwargs)
    twin = architecture.twin()
    copy_weights(variables, twin)
    return Pair(name, architecture, variables, twin, inputs, targets)
