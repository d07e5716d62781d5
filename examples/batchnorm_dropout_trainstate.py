# %% [markdown]
# # BatchNorm, Dropout and a training state
#
# You will have trained a network with batch normalization and dropout in a
# `TrainState`, wrapped it in evaluation mode, and seen what goes wrong with the wrong
# mode, without the batch statistics, or with old ones. At the end, dropout says which
# parts of an explanation the network is sure of.
#
# ## A network with two modes

# %%
from typing import Any

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax.training import train_state
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

images, digits = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
split = train_test_split(images, digits, random_state=0)
train_x, test_x, train_y, test_y = split


class Block(nn.Module):
    features: int
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(x)
        return nn.relu(x)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train, dropout=None):
        x = Block(16, train)(x)
        x = nn.max_pool(Block(32, train)(x), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        dropout = train if dropout is None else dropout
        x = nn.Dropout(0.3, deterministic=not dropout)(x)
        return nn.Dense(10)(x)


# %% [markdown]
# `train` switches both layers. In training, `BatchNorm` scales by the mean and the
# variance of the batch, and updates running averages of them, $\mu \leftarrow 0.9\,\mu +
# 0.1\,\mu_\text{batch}$, which it uses later. `Dropout` drops three features in ten, at
# random. The second flag, `dropout`, is for
# [the end of this page](#what-is-the-network-sure-of).
#
# ## The training state
#
# Flax's `TrainState` holds the parameters and the optimizer. The running averages are
# another collection of variables, `batch_stats`: a subclass gives them a field.


# %%
class TrainState(train_state.TrainState):
    batch_stats: Any


model = CNN()
variables = model.init(jax.random.key(0), train_x[:1], train=False)
state = TrainState.create(
    apply_fn=model.apply,
    params=variables["params"],
    batch_stats=variables["batch_stats"],
    tx=optax.adam(2e-3),
)


@jax.jit
def step(state, x, y, key):
    def loss(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), updates

    gradients, updates = jax.grad(loss, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradients)
    return state.replace(batch_stats=updates["batch_stats"])


rng = np.random.default_rng(0)
for key in jax.random.split(jax.random.key(1), 200):
    batch = rng.choice(len(train_x), 64)
    state = step(state, train_x[batch], train_y[batch], key)
    if state.step == 10:
        early = state.batch_stats  # for a comparison below

print(f"{int(state.step)} steps")

# %% [markdown]
# ## Wrap it in evaluation mode
#
# The wrapper takes what the module's `apply` takes: all the collections that it reads,
# and its keyword arguments.

# %%
from xplique_flax import FlaxWrapper

trained = {"params": state.params, "batch_stats": state.batch_stats}
wrapped = FlaxWrapper(
    model,
    trained,
    input_shape=(8, 8, 1),
    apply_kwargs={"train": False},
)

logits = state.apply_fn(trained, test_x, train=False)
print(f"Accuracy on held-out digits: {(logits.argmax(-1) == test_y).mean():.1%}")
print(f"Largest difference: {np.abs(wrapped(test_x) - logits).max():.1e}")
print(*[layer.name for layer in wrapped.layers], sep=", ")

# %% [markdown]
# The wrapped model computes what `apply` does. Each module is a layer, in evaluation
# mode: batch normalization is now a fixed scale and shift, and dropout does nothing.
# Every method of Xplique can be used. Here is one that asks for gradients of the output
# alone, and two that look inside the network. Of maps with two signs, red speaks for
# the digit and blue against it.

# %% alt="Eight digits and three rows of explanations. Integrated Gradients marks a few pixels on the strokes, mostly red. Grad-CAM++ lights up broader regions along the strokes. Guided Backprop marks the strokes red and the gaps between them blue."
from xplique.attributions import GradCAMPP, GuidedBackprop, IntegratedGradients

inputs, targets = test_x[:100], np.eye(10, dtype="float32")[test_y[:100]]
maps = {
    "Integrated Gradients": IntegratedGradients(wrapped, batch_size=1000),
    "Grad-CAM++": GradCAMPP(wrapped, batch_size=100),
    "Guided Backprop": GuidedBackprop(wrapped, batch_size=100),
}
maps = {name: np.array(explainer(inputs, targets)) for name, explainer in maps.items()}


def show(digits, maps):
    rows = {"Digits": digits} | maps
    shape = len(rows), len(digits)
    figure, grid = plt.subplots(*shape, figsize=(8, 1.25 * len(rows)))
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        line[0].set_title(name, loc="left", fontsize=10)
        for axes, picture in zip(line, pictures[..., 0], strict=True):
            limit = np.abs(picture).max()
            if picture.min() < 0:
                axes.imshow(picture, cmap="coolwarm", vmin=-limit, vmax=limit)
            else:
                axes.imshow(picture)
            axes.axis("off")
    plt.tight_layout()
    plt.show()


show(inputs[:8], {name: explanations[:8] for name, explanations in maps.items()})

# %% [markdown]
# ## Why not in training mode?
#
# The wrapper refuses the training mode:

# %%
import textwrap

try:
    FlaxWrapper(model, trained, input_shape=(8, 8, 1), apply_kwargs={"train": True})
except ValueError as error:
    print(textwrap.fill(str(error), 80, break_long_words=False))

# %% [markdown]
# It is not only that the running averages would change. In training mode an image has no
# prediction of its own: the batch that it happens to be in decides on the scale of every
# feature. Here is the same handwritten 1 in three batches, without dropout:

# %%
image = test_x[6:7]
batches = {
    "among mixed digits": train_x[:63],
    "among other ones": train_x[train_y == 1][:63],
    "among copies of itself": np.repeat(image, 63, axis=0),
}
for name, others in batches.items():
    logits, _ = model.apply(
        trained,
        np.concatenate([image, others]),
        train=True,
        dropout=False,
        mutable=["batch_stats"],
    )
    print(f"{name + ':':25} logit {logits[0, 1]:5.2f}")
print(f"{'in evaluation mode:':25} logit {wrapped(image)[0, 1]:5.2f}")

# %% [markdown]
# Explainers fill batches in their own ways: Occlusion with altered copies of one image,
# Integrated Gradients with shades of it. An explanation in training mode would describe
# the explainer's batches along with the model.
#
# ## The statistics matter
#
# The parameters alone are not a model. Without the running averages, Flax has nothing to
# normalize with:

# %%
try:
    FlaxWrapper(model, {"params": state.params}, apply_kwargs={"train": False})(inputs)
except ValueError as error:
    print(textwrap.fill(str(error), 80, break_long_words=False))

# %% [markdown]
# That error is the fortunate case. With *wrong* statistics nothing fails. They come from
# a training loop that drops the updates, or from a checkpoint that holds `params` alone,
# with the rest taken from a fresh `init`: a mean of 0 and a variance of 1.


# %% output="markdown"
def explain(batch_stats):
    variables = {"params": state.params, "batch_stats": batch_stats}
    stale = FlaxWrapper(model, variables, apply_kwargs={"train": False})
    accuracy = (np.argmax(stale(test_x), axis=-1) == test_y).mean()
    explainer = IntegratedGradients(stale, batch_size=1000)
    return accuracy, np.array(explainer(inputs, targets))


statistics = {
    "trained": state.batch_stats,
    "after 10 of 200 steps": early,
    "initial": variables["batch_stats"],
}
results = {name: explain(batch_stats) for name, batch_stats in statistics.items()}

print("| statistics | accuracy | correlation with the right explanations |")
print("| :--- | ---: | ---: |")
right = maps["Integrated Gradients"].ravel()
for name, (accuracy, explanations) in results.items():
    correlation = np.corrcoef(right, explanations.ravel())[0, 1]
    print(f"| {name} | {accuracy:.1%} | {correlation:.2f} |")

# %% alt="Eight digits, and three rows of their Integrated Gradients: with the trained statistics, with those after 10 steps, and with the initial ones. The main pixels stay, but more and more of the others change in strength and sign from row to row."
show(inputs[:8], {name: found[:8] for name, (_, found) in results.items()})

# %% [markdown]
# With the initial statistics most digits are still right, so that a quick look at some
# predictions reveals nothing. But the explanations are those of another function.
#
# !!! warning "Compare the accuracy before you explain"
#     Compute the accuracy of the *wrapped* model on held-out data, and compare it with
#     the one that your training loop reported. This one line finds wrong statistics, a
#     wrong mode, a wrong checkpoint and inputs that were scaled differently.
#
# ## What is the network sure of?
#
# With dropout left on, each call of a network is a sample from many thinned networks.
# Where their explanations agree, the explanation doesn't hinge on a few features. Batch
# normalization stays in evaluation mode: that is what the module's second flag is for.
#
# The wrapper takes the random stream in `rngs`, and starts it anew at each call, so that
# results can be repeated. Each row of a batch has its own dropout mask: 64 copies of an
# image give 64 samples.
#
# The three held-out digits that the network is least sure of, and three of the surest:

# %%
from xplique.attributions import GradientInput

stochastic = FlaxWrapper(
    model,
    trained,
    apply_kwargs={"train": False, "dropout": True},
    rngs={"dropout": jax.random.key(2)},
)

confidence = jax.nn.softmax(wrapped(test_x).numpy()).max(axis=-1)
order = np.argsort(confidence)
chosen = np.concatenate([order[:3], order[-3:]])

copies = np.repeat(test_x[chosen], 64, axis=0)
labels = np.repeat(np.eye(10, dtype="float32")[test_y[chosen]], 64, axis=0)
explainer = GradientInput(stochastic, batch_size=len(copies))
samples = np.array(explainer(copies, labels))
again = np.array(explainer(copies, labels))
print(f"The same samples at a second call: {np.array_equal(samples, again)}")

samples = samples.reshape(6, 64, 8, 8, 1)
probabilities = jax.nn.softmax(stochastic(copies).numpy()).reshape(6, 64, 10)
for digit, rows in zip(test_y[chosen], probabilities, strict=True):
    right = rows[:, digit]
    print(f"probability of the right digit, {digit}: {right.mean():.2f} ± {right.std():.2f}")

# %% [markdown]
# Gradient × input is one pass through the network per row, so each sample is one thinned
# network's explanation. Methods that call the model many times for one input, such as
# Integrated Gradients or Occlusion, would meet another mask at each call, and mix that
# noise into every explanation: leave dropout off for them.
#
# Below are the mean of the samples, their standard deviation, and the mean where it is
# at least two deviations from zero: the pixels about which the thinned networks agree.

# %% alt="Six digits, the network less sure of the first three than of the last three. The means of their explanations are red and blue along the strokes. The standard deviations are large all over the strokes. Of the means only some pixels are left where they exceed two standard deviations, most of them red."
mean, deviation = samples.mean(axis=1), samples.std(axis=1)
agreed = np.where(np.abs(mean) >= 2 * deviation, mean, 0)
rows = {"mean": mean, "standard deviation": deviation, "agreed upon": agreed}
show(test_x[chosen], rows)

# %% [markdown]
# The strong pixels stay. How much of the mean is agreed upon, and how much of that is
# blue, against the digit?

# %%
for name, part in {"least sure": slice(0, 3), "surest": slice(3, 6)}.items():
    kept = np.abs(agreed[part]).sum() / np.abs(mean[part]).sum()
    against = -agreed[part].clip(max=0).sum() / np.abs(agreed[part]).sum()
    print(f"{name}: {kept:.0%} is agreed upon, {against:.0%} of that against the digit")

# %% [markdown]
# Sure or not, the thinned networks agree upon most of it. What differs is its direction:
# where the network is least sure, far more of it speaks against the digit.
#
# Next: [save such a state and explain it after restoring](orbax_checkpoint.py), the
# [arguments of the wrapper](../guide/wrap.md) one by one, or the
# [layers of a residual network](residual_network.py).
