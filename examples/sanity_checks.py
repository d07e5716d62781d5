# %% [markdown]
# # Sanity checks by randomizing the model
#
# An explanation of a model has to change when the model does. Here the layers of a trained network
# are replaced by random ones, from the output to the input, and eight methods explain each stage.
# The result: Guided Backprop still draws strokes of both digits when only the first layer is left
# of what was learned. And two of Xplique's metrics do such checks for you, for those methods that
# they fit.
#
# !!! note "Random models, on purpose"
#     All other pages explain trained models only. Here a random model is the experiment: it knows
#     nothing, so an explanation that looks the same for it cannot show what the trained one knows.

# %% [markdown]
# ## The model and its scenes
#
# As in the [gallery](methods_gallery.py): two handwritten digits on a crop of a photograph, and a
# network that says for each of the ten digits whether it is in the scene.

# %%
import jax
import numpy as np
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

images, digits = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8)
ink = np.array(jax.image.resize(images, (len(images), 16, 16), "linear"))
train_ids, test_ids = train_test_split(np.arange(len(digits)), random_state=0)

photos = [photo[::2, ::2] / 255 * 0.6 for photo in load_sample_images().images]
train_photos = [photo[:, :160] for photo in photos]
test_photos = [photo[:, 160:] for photo in photos]


def compose(number, ids, photos, rng):
    """Write two different digits on each of a number of crops."""
    scenes = np.empty((number, 48, 48, 3), "float32")
    labels = np.empty((number, 2), int)
    corners = np.empty((number, 2, 2), int)
    for i, scene in enumerate(scenes):
        photo = photos[rng.integers(2)]
        y, x = rng.integers(0, np.subtract(photo.shape[:2], 48))
        scene[:] = photo[y : y + 48, x : x + 48]
        labels[i] = rng.choice(10, 2, replace=False)
        corners[i] = rng.integers([[0, 0], [0, 24]], [[33, 9], [33, 33]])
        for label, (y, x) in zip(labels[i], corners[i]):
            strokes = ink[rng.choice(ids[digits[ids] == label])]
            place = scene[y : y + 16, x : x + 16]
            place += (1 - place) * strokes[..., None]
    return scenes, labels, corners


rng = np.random.default_rng(0)
test_x, test_labels, corners = compose(500, test_ids, test_photos, rng)

# %%
import flax.linen as nn
import optax


class SceneNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (5, 5), strides=(2, 2))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.Conv(48, (3, 3))(x))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        return nn.Dense(10)(x.max(axis=(1, 2)))


model = SceneNet()
params = jax.jit(model.init)(jax.random.PRNGKey(0), test_x[:1])
steps = 800
optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, steps))
state = optimizer.init(params)


def loss(params, x, labels):
    present = jax.nn.one_hot(labels, 10).sum(axis=1)
    logits = model.apply(params, x)
    return optax.sigmoid_binary_cross_entropy(logits, present).mean()


@jax.jit
def step(params, state, x, labels):
    updates, state = optimizer.update(jax.grad(loss)(params, x, labels), state)
    return optax.apply_updates(params, updates), state


for _ in range(steps):
    x, labels, _ = compose(32, train_ids, train_photos, rng)
    params, state = step(params, state, x, labels)

top_two = np.argsort(model.apply(params, test_x))[:, -2:]
found = (np.sort(top_two) == np.sort(test_labels)).all(axis=1)
print(f"Both digits found in {found.mean():.1%} of {len(found)} held-out scenes")

# %% [markdown]
# ## Eight explainers
#
# Each explains, for a few held-out scenes in which both digits were found, why the first of them is
# there.

# %%
import tensorflow as tf
from xplique import attributions as xa

from xplique_flax import FlaxWrapper

wrapped = FlaxWrapper(model, params, input_shape=(48, 48, 3))

chosen = [292, *np.flatnonzero(found)[:11]]
inputs = test_x[chosen]
targets = np.eye(10, dtype="float32")[test_labels[chosen, 0]]

explainers = {
    "Saliency": xa.Saliency(wrapped),
    "Gradient Input": xa.GradientInput(wrapped),
    "SmoothGrad": xa.SmoothGrad(wrapped, noise=0.1, nb_samples=30, batch_size=360),
    "Guided Backprop": xa.GuidedBackprop(wrapped),
    "DeconvNet": xa.DeconvNet(wrapped),
    "Grad-CAM": xa.GradCAM(wrapped, conv_layer="relu_3"),
    "FEM": xa.FEM(wrapped, conv_layer="relu_3"),
    "Occlusion": xa.Occlusion(wrapped, patch_size=6, patch_stride=3, batch_size=225),
}


def explain():
    tf.random.set_seed(0)  # the same noise for SmoothGrad at each stage
    return {name: np.array(each(inputs, targets)) for name, each in explainers.items()}


stages = {"trained": explain()}

# %% [markdown]
# ## Randomize layer by layer
#
# The random weights are those that training could have begun with: `model.init` with another key.
# `set_weights` takes a layer's parameters in Keras's order, the kernel before the bias, and the
# next explanation uses them.
#
# Guided Backprop and DeconvNet explain a copy of the model with other ReLUs, which they made when
# they were made themselves. So the weights are set in the model of each explainer. Explainers
# that share a model get them twice, which does no harm. The model of FEM ends at its layer.

# %%
initial = jax.jit(model.init)(jax.random.PRNGKey(1), inputs)["params"]

for name in ["Dense_0", "Conv_3", "Conv_2", "Conv_1", "Conv_0"]:
    weights = [initial[name]["kernel"], initial[name]["bias"]]
    for explainer in explainers.values():
        for layer in explainer.model.layers:
            if layer.name == name:
                layer.set_weights(weights)
    stages[f"+ {name}"] = explain()

difference = wrapped(inputs) - model.apply({"params": initial}, inputs)
print("All layers are random:", np.abs(difference).max() < 1e-5)

# %% [markdown]
# The parameters of the Flax model are what they were: `set_weights` changes the wrapped model only.
#
# ## What the maps look like
#
# From left to right, one more layer is random. Maps with a sign are in red and blue, the others
# from dark to yellow, each with a scale of its own.

# %% alt="Maps of one scene with an 8 on the left and a 7 on the right, for eight methods in rows and six stages of randomization in columns. In the first column nearly all mark the 8. Saliency, Gradient Input, SmoothGrad and Grad-CAM lose it and become diffuse or spotted; Occlusion moves off it and changes its sign. Guided Backprop draws strokes of both digits until only the first layer is as trained. FEM does not change in the second column."
import matplotlib.pyplot as plt

signed = ["Gradient Input", "SmoothGrad", "Guided Backprop", "DeconvNet", "Occlusion"]
figure, rows = plt.subplots(8, 6, figsize=(8, 10.4), layout="constrained")
for row, method in zip(rows, explainers):
    row[0].set_ylabel(method, fontsize=9)
    for axes, (stage, maps) in zip(row, stages.items()):
        picture = maps[method][0, ..., 0]
        limit = np.abs(picture).max()
        if method in signed:
            axes.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit)
        else:
            axes.imshow(picture)
        axes.set(xticks=[], yticks=[])
        if method == "Saliency":
            axes.set_title(stage, fontsize=10)

plt.show()

# %% [markdown]
# Follow one row. Most maps change as soon as the last layer, the one that knows the digits, is
# random, and soon they are not about the 8 any more. That is what an explanation should do.
# Guided Backprop goes on to draw digits, now both of them, for a network that no longer knows
# any: it shows the contrasts that pass the ReLUs.
#
# FEM does not change at first, for it looks at nothing after its layer: it answers another
# question.

# %% [markdown]
# ## How much they change
#
# The usual measure is Spearman's rank correlation between the map of the trained model and the
# map of each stage. Here is its mean over the scenes:

# %% output="markdown"
from xplique.metrics.randomization import batched_spearman


def similarity(before, after):
    flat = [maps.reshape(len(maps), -1) for maps in (before, after)]
    return float(np.mean(batched_spearman(*flat)))


randomized = [stage for stage in stages if stage != "trained"]
print("| Method |", " | ".join(randomized), "|")
print("| :-- |" + " --: |" * len(randomized))
for method in explainers:
    trained = stages["trained"][method]
    values = [similarity(trained, stages[stage][method]) for stage in randomized]
    print(f"| {method} |", " | ".join(f"{value:.2f}" for value in values), "|")

# %% [markdown]
# !!! warning "Read along a row, not down a column"
#     The maps of Saliency are positive, and any network, trained or not, reacts more to contrasts
#     than to an even sky. So its ranks stay alike, though its pictures do not. The last column,
#     where nothing learned is left, shows how much of a correlation is due to the scene and the
#     architecture alone.
#
# Among the maps with a sign, that of Gradient Input, SmoothGrad and Occlusion is lost with the
# first random layer. Guided Backprop falls slowly, and drops only when the first layer is random
# too: what it shows depends on the edges that the first layer finds more than on what the others
# make of them.

# %% [markdown]
# ## Xplique's own metrics
#
# **Model Randomization** does the same in one call: it gives a share of the layers random
# weights, from the output on, and returns the rank correlation. **Random Logit** leaves the model
# as it is, asks about a random other digit, and returns the structural similarity (SSIM) of both
# maps. Low is good in both.
#
# They need the trained model again, so wrap it anew. Before you trust a check, check it: with a
# share of 0 nothing is randomized, and the correlation has to be 1; with a share of 1 it must not
# stay there.

# %% output="markdown"
from xplique.metrics import ModelRandomizationMetric, RandomLogitMetric
from xplique.metrics.randomization import ProgressiveLayerRandomization

tf.get_logger().setLevel("ERROR")  # hides notes about functions that are compiled anew

wrapped = FlaxWrapper(model, params, input_shape=(48, 48, 3))
explainers = {
    "Saliency": xa.Saliency(wrapped),
    "Gradient Input": xa.GradientInput(wrapped),
    "SmoothGrad": xa.SmoothGrad(wrapped, noise=0.1, nb_samples=30, batch_size=360),
    "FEM": xa.FEM(wrapped, conv_layer="relu_3"),
    "Occlusion": xa.Occlusion(wrapped, patch_size=6, patch_stride=3, batch_size=225),
    "Guided Backprop": xa.GuidedBackprop(wrapped),
    "DeconvNet": xa.DeconvNet(wrapped),
    "Grad-CAM": xa.GradCAM(wrapped, conv_layer="relu_3"),
}
data = (wrapped, inputs, targets)
nothing, everything = map(ProgressiveLayerRandomization, [0.0, 1.0])
checks = {
    "Nothing random": ModelRandomizationMetric(*data, nothing),
    "All layers random": ModelRandomizationMetric(*data, everything),
    "Random Logit": RandomLogitMetric(*data),
}
print("| Method |", " | ".join(checks), "|")
print("| :-- |" + " --: |" * len(checks))
for name, explainer in explainers.items():
    values = [check(explainer) for check in checks.values()]
    print(f"| {name} |", " | ".join(f"{value:.2f}" for value in values), "|")

# %% [markdown]
# !!! warning "Model Randomization does not fit Guided Backprop, DeconvNet, Grad-CAM and Grad-CAM++"
#     Guided Backprop and DeconvNet fail the check of the check. Grad-CAM passes it, but has 1 with
#     all layers random, too. The metric puts a copy of the model into the explainer. The copy has
#     ordinary ReLUs, so Guided Backprop and DeconvNet become plain gradients, and change even when
#     nothing is random. Grad-CAM has compiled its first model and goes on using it, so nothing ever
#     changes. This is so in Xplique 2.0.2 for native Keras models too. For these methods do as
#     above: randomize layer by layer.
#
# The first column of SmoothGrad and of other methods that draw random numbers is not exactly 1:
# two runs on one model differ. It is the mark to compare the second column with.
#
# The metric draws weights between 0 and 1, all of them positive, and not those that training
# begins with. That is a harsher change than the one above. By default it randomizes a quarter of
# the layers that have weights, [rounded
# down](../guide/limitations.md#model-randomization-may-randomize-nothing).
#
# In the column of Random Logit FEM has 1, since it ignores targets. All others change with the
# question, Guided Backprop least of them: its maps, too, depend on where in the scene the target's
# score comes from.

# %% [markdown]
# ## What a passed check means
#
# That a map changes with the model is necessary, and not sufficient: noise would pass. Which
# methods are faithful is the subject of [Choosing a method with
# metrics](choosing_with_metrics.py). There Guided Backprop has some of the best scores: fidelity
# alone does not show what this page shows.
#
# Nor does a slow fall condemn a method by itself. The architecture alone has a say in where the
# score comes from, rank correlations depend on the sign and on the background, and random upper
# layers pass on much of what the trained lower ones find.

# %% [markdown]
# ## Sources
#
# - The checks: Adebayo, Gilmer, Muelly, Goodfellow, Hardt and Kim (2018), *Sanity Checks for
#   Saliency Maps*
# - Why Guided Backprop and DeconvNet restore the image: Nie, Zhang and Patel (2018), *A Theoretical
#   Explanation for Perplexing Behaviors of Backpropagation-based Visualizations*
# - What such checks cannot show: Binder, Weber, Lapuschkin, Montavon, Müller and Samek (2023),
#   *Shortcomings of Top-Down Randomization-Based Sanity Checks for Evaluations of Deep Neural
#   Network Explanations*
#
# The methods' own papers are listed in the [gallery](methods_gallery.py#sources).
