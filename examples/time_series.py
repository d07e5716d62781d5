# %% [markdown]
# # Time series
#
# You will have trained a recurrent Flax network on series in which the true moment of
# each event is known, explained its decisions over time with five methods, and measured
# how often each of them points at the right moment. The best do so for about nine
# series in ten.
#
# ## Series with a known truth
#
# A strip of paper with four handwritten digits passes under a scanner of eight sensors.
# At each step the scanner reads one column of eight pixels: a series of shape $(T, W)$
# with $T = 32$ steps and $W = 8$ channels. One of the four digits is below five, at a
# random place, the others are five or more. The network has to say *which* of the
# digits 0 to 4 has passed. A good explanation should say *when*.
#
# The digits are scikit-learn's, from real hands, and the held-out strips are made of
# digits that no training strip contains.

# %%
import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

images, digits = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8).astype("float32")
split = train_test_split(images, digits, random_state=0)
train_images, test_images, train_digits, test_digits = split


def make_strips(images, digits, count, seed):
    """Return series (N, 32, 8), the digits sought, and their places (0 to 3)."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(np.flatnonzero(digits >= 5), (count, 4))
    places = rng.integers(4, size=count)
    sought = rng.choice(np.flatnonzero(digits < 5), count)
    chosen[np.arange(count), places] = sought
    columns = images[chosen].transpose(0, 1, 3, 2)  # one column of pixels per step
    return columns.reshape(count, 32, 8), digits[sought], places


train_x, train_y, _ = make_strips(train_images, train_digits, 6000, seed=0)
test_x, test_y, places = make_strips(test_images, test_digits, 500, seed=1)
print(train_x.shape, test_x.shape)


# %% [markdown]
# ## A recurrent network
#
# `nn.RNN` runs a GRU cell over the steps, and the last state decides. It has to remember
# what it saw while the rest of the strip goes by.


# %%
class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        states = nn.RNN(nn.GRUCell(32))(x)
        return nn.Dense(5)(states[:, -1])


def train(model, steps, learning_rate):
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    params = model.init(jax.random.key(0), train_x[:1])
    state = optimizer.init(params)

    def loss(params, x, y):
        logits = model.apply(params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean()

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = rng.choice(len(train_x), 64)
        params, state = step(params, state, train_x[batch], train_y[batch])
    return params


def accuracy(model, params, x, y):
    return float((model.apply(params, x).argmax(-1) == y).mean())


model = Recurrent()
params = train(model, steps=400, learning_rate=1e-2)
print(f"Accuracy on held-out strips: {accuracy(model, params, test_x, test_y):.1%}")

# %% [markdown]
# ## Explain over time
#
# Inputs of shape $(N, T, W)$ give explanations of the same shape: one number per step
# and channel.
#
# !!! note "Patches, masks and segments in time"
#     - **Occlusion** slides a patch over steps and channels. `patch_size=(4, 8)` with
#       `patch_stride=(1, 8)` covers four steps and all eight channels: a patch in time.
#       A single integer would mean a square over steps and channels.
#     - **Rise** takes a grid of steps and channels, and the second number has to be
#       $W$: `grid_size=(8, 8)`.
#     - **Kernel SHAP** and **LIME** count each pair of step and channel as a feature, 256
#       here. `map_to_interpret_space` groups them: below, two steps form a segment,
#       which leaves sixteen.
#
# What is taken away is replaced by 0 in all three: blank paper.

# %%
from xplique.attributions import (
    IntegratedGradients,
    KernelShap,
    Occlusion,
    Rise,
    Saliency,
)

from xplique_flax import FlaxWrapper


def segments(series):
    steps = tf.range(len(series)) // 2
    return tf.tile(steps[:, None], [1, series.shape[1]])


def make_explainers(wrapped):
    return {
        "Saliency": Saliency(wrapped, batch_size=100),
        "Integrated Gradients": IntegratedGradients(wrapped, batch_size=1000),
        "Occlusion": Occlusion(wrapped, batch_size=64, patch_size=(4, 8), patch_stride=(1, 8)),
        "Rise": Rise(wrapped, batch_size=300, nb_samples=300, grid_size=(8, 8)),
        "Kernel SHAP": KernelShap(
            wrapped,
            300,
            nb_samples=300,
            map_to_interpret_space=segments,
        ),
    }


wrapped = FlaxWrapper(model, params)
inputs, targets = test_x[:100], np.eye(5, dtype="float32")[test_y[:100]]

tf.random.set_seed(0)
explanations = {
    name: np.array(explainer(inputs, targets))
    for name, explainer in make_explainers(wrapped).items()
}
for name, values in explanations.items():
    print(f"{name}: {inputs.shape} → {values.shape}")

# %% [markdown]
# One strip and its five explanations, steps from left to right, channels from top to
# bottom. Red speaks for the digit, blue against it. Saliency has no sign. Rise is the
# mean score of what is kept: all its values are positive, so the figure shows their
# distance from the mean.

# %% alt="A strip with the digits 6, 5, 2 and 7, and five explanations of the decision for 2 below it. Occlusion and Kernel SHAP are red over the steps of the 2. Integrated Gradients has its strongest red and blue pixels on the strokes of the 2. Saliency is strongest there but spread over other steps, too. Rise has one strong red streak at the lower end of the 2."
shown = 1
maps = explanations | {"Rise": explanations["Rise"] - explanations["Rise"][shown].mean()}

figure, rows = plt.subplots(6, 1, figsize=(8, 6.6), sharex=True, layout="constrained")
rows[0].imshow(inputs[shown].T, cmap="gray_r", aspect="auto")
rows[0].set_title(f"the strip, with a {test_y[shown]}", loc="left")
for axes, (name, values) in zip(rows[1:], maps.items(), strict=True):
    limit = np.abs(values[shown]).max()
    axes.imshow(values[shown].T, cmap="coolwarm", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_title(name, loc="left")
for axes in rows:
    axes.set_yticks([])
    axes.set_xticks(np.arange(0, 33, 8) - 0.5, np.arange(0, 33, 8))
rows[-1].set_xlabel("step")
plt.show()

# %% [markdown]
# ## How often is the moment right?
#
# The importance of a step is the sum over its channels, $m_t = \sum_w \phi_{t,w}$.
# Three numbers judge it:
#
# - **Pointing**: how often the most important step lies within the digit that was
#   sought. Chance is one in four.
# - **Masking**: the accuracy after the eight most important steps are blanked. The lower
#   it is, the more the network needed them. Eight random steps, and the eight steps of
#   the true digit, are there to compare with.
# - **Deletion**, Xplique's metric, takes away single pairs of step and channel, and
#   follows the probability of the class. Lower is better.

# %% output="markdown"
from xplique.metrics import Deletion

numbers = np.arange(len(inputs))
truth = places[numbers, None] * 8 + np.arange(8)
random = np.random.default_rng(0).permuted([np.arange(32)] * len(inputs), axis=1)


def masked_accuracy(model, params, steps):
    masked = inputs.copy()
    masked[numbers[:, None], steps] = 0
    return accuracy(model, params, masked, test_y[numbers])


def judge(model, params, wrapped, explanations):
    deletion = Deletion(wrapped, inputs, targets, activation="softmax")
    print("| method | points at the digit | accuracy, 8 steps masked | Deletion |")
    print("| :--- | ---: | ---: | ---: |")
    for name, values in explanations.items():
        over_time = values.sum(axis=-1)
        hits = np.mean(over_time.argmax(axis=1) // 8 == places[numbers])
        left = masked_accuracy(model, params, over_time.argsort(axis=1)[:, -8:])
        print(f"| {name} | {hits:.0%} | {left:.0%} | {deletion(values):.2f} |")
    left = masked_accuracy(model, params, random[:, :8])
    print(f"| *random steps* | *25%* | *{left:.0%}* | |")
    left = masked_accuracy(model, params, truth)
    print(f"| *the digit itself* | *100%* | *{left:.0%}* | |")


before = accuracy(model, params, inputs, test_y[numbers])
print(f"Accuracy, nothing masked: {before:.0%}\n")
judge(model, params, wrapped, explanations)

# %% [markdown]
# Integrated Gradients, Occlusion and Kernel SHAP find the moment in about nine strips of
# ten. Without the steps that they name the network is lost: its accuracy falls even
# below chance. They take away what speaks for the digit, here and elsewhere, and leave
# what speaks against it.
#
# Saliency is right about half of the time. The size of a gradient says where the score
# *could* be changed, and a recurrent network can be changed at every step.
#
# Rise is behind in the first two columns and good in the third. Its masks treat each
# channel apart, and so does Deletion, while Occlusion's patches say nothing about
# channels. Choose a metric that takes away what your question is about: moments, or
# single readings.
#
# ## Is it the method, or the model?
#
# A convolutional network solves the same task. It sees five steps at a time, twice, and
# takes the maximum over time, so that each of its features comes from one place.


# %%
class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (5,))(x))
        x = nn.relu(nn.Conv(64, (5,))(x))
        return nn.Dense(5)(x.max(axis=1))


model = Convolutional()
params = train(model, steps=200, learning_rate=1e-2)
print(f"Accuracy on held-out strips: {accuracy(model, params, test_x, test_y):.1%}")

# %% output="markdown"
wrapped = FlaxWrapper(model, params)
tf.random.set_seed(0)
explanations = {
    name: np.array(explainer(inputs, targets))
    for name, explainer in make_explainers(wrapped).items()
}
judge(model, params, wrapped, explanations)

# %% [markdown]
# Now nearly every explanation points at the digit, Saliency's included. A low score for
# an explanation may be the method's fault or tell the truth about a model: measure on
# your own one.
#
# !!! tip "Which methods take series?"
#     Those of this page, LIME, Gradient × input, SmoothGrad, SquareGrad, VarGrad and, for
#     networks with ReLUs and with `input_shape=(32, 8)`, Guided Backprop and DeconvNet.
#     Grad-CAM, Grad-CAM++, FEM, Sobol and HSIC expect images.
#
# The [formats of inputs](../guide/inputs.md) are described with the first step, a
# regression on a table is [another tutorial](tabular_regression.py), and
# [choosing a method by metrics](choosing_with_metrics.py) goes on where this page ends.
