# %% [markdown]
# # CRAFT and TCAV: the concepts behind a class
#
# An attribution map says where a model looks. A concept says what it sees there: tiles, sky,
# petals. On this page [CRAFT](https://arxiv.org/abs/2211.10154) finds the concepts that a network
# uses for one class, [TCAV](https://arxiv.org/abs/1711.11279) tests concepts of your own, and
# [Holistic CRAFT](https://arxiv.org/abs/2306.07304) finds and weighs the concepts of two whole
# photographs. What a concept is, and where, can be judged by eye.

# %% [markdown]
# ## Four regions of two photographs
#
# Simple outlines divide each of scikit-learn's two photographs into its subject and the rest. That
# gives four classes: `tower`, `landscape`, `dahlia` and `leaves`. A dashed line goes through the
# middle of each subject. What is to the right of it is for training, what is to the left for testing.

# %%
import numpy as np
from sklearn.datasets import load_sample_images

china, flower = (photo / 255 for photo in load_sample_images().images)
classes = ["tower", "landscape", "dahlia", "leaves"]

y, x = np.mgrid[:427, :640]
width = np.interp(y, [30, 60, 125, 180, 265, 340], [0, 30, 115, 125, 145, 170])
tower = (abs(x - 207) < width) & (y < np.where(x < 207, 345, 400))
dahlia = (np.hypot(x - 307, y - 222) < 138) | (np.hypot(x - 380, y - 450) < 90)
regions = [np.where(tower, 0, 1), np.where(dahlia, 2, 3)]
middles = [208, 305]

# %% alt="Two photographs, each with a dashed vertical line. In the first an outline follows a Chinese tower, around which are sky, a lake and trees. In the second two circles enclose a large orange dahlia and a part of a second one, in front of dark, blurred leaves."
import matplotlib.pyplot as plt

extent = 0, 640, 427, 0
figure, row = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
for axes, photo, region, middle in zip(row, [china, flower], regions, middles):
    axes.imshow(photo[::4, ::4], interpolation="nearest", extent=extent)
    axes.contour(region % 2, [0.5], colors="white", linewidths=1.5)
    axes.axvline(middle, color="white", linestyle="--")
    axes.axis("off")
row[0].set_title("tower and landscape", fontsize=11)
row[1].set_title("dahlia and leaves", fontsize=11)
plt.show()

# %% [markdown]
# The white outlines separate the classes, roughly.
#
# The network gets crops of 48×48 pixels. At least 80% of the pixels of a crop belong to its class.
# The crops come from the photographs at four sizes. CRAFT enlarges pieces of crops, so the network
# has to know things at several sizes.

# %%
import tensorflow as tf

zooms = [0.4, 0.6, 1.0, 1.5]


def resized(picture, zoom, **options):
    height, width = picture.shape[:2]
    size = round(height * zoom), round(width * zoom)
    return tf.image.resize(picture, size, **options).numpy()


def parts(side):
    """Give one side of both photographs and of their regions, at each size."""
    resizings = {}
    for photo, region, middle in zip([china, flower], regions, middles):
        columns = slice(middle) if side == "left" else slice(middle, None)
        for zoom in zooms:
            picture = resized(photo[:, columns], zoom, antialias=True).clip(0, 1)
            there = resized(region[:, columns, None], zoom, method="nearest")
            resizings[photo is flower, zoom] = picture, there[..., 0]
    return resizings


def crops(side, number, rng, zooms=zooms):
    """Cut out as many crops of each class."""
    images, labels = np.empty((number, 48, 48, 3), "float32"), np.arange(number) % 4
    for image, label in zip(images, labels):
        share = 0
        while share < 0.8:
            picture, region = side[label > 1, rng.choice(zooms)]
            top, left = rng.integers(np.subtract(region.shape, 47))
            place = slice(top, top + 48), slice(left, left + 48)
            share = (region[place] == label).mean()
        image[:] = picture[place][:, :: rng.choice([-1, 1])]
    return images, labels


rng = np.random.default_rng(0)
right, left = parts("right"), parts("left")
train_x, train_y = crops(right, 3000, rng)
test_x, test_y = crops(left, 800, rng)

# %% [markdown]
# ## The network
#
# Four convolutions, each with a ReLU, the mean over all places, and two dense layers. Brightness
# and tint of each training crop are changed at random, so that the network learns more than colors.

# %%
import flax.linen as nn
import jax
import optax


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (5, 5), strides=2)(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(48, (3, 3))(x))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.relu(nn.Dense(32)(x.mean(axis=(1, 2))))
        return nn.Dense(4)(x)


model = Net()
key = jax.random.key(1, impl="rbg")  # compiles faster than the default
params = jax.jit(model.init)(key, test_x[:1])
steps = 300
optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 3e-3))
state = optimizer.init(params)


def loss(params, x, y):
    logits = model.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def step(params, state, x, y):
    gradient = jax.grad(loss)(params, x, y)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


for _ in range(steps):
    batch = rng.choice(len(train_x), 32)
    brightness, tint = rng.normal(size=(32, 1, 1, 1)), rng.normal(size=(32, 1, 1, 3))
    x = np.clip(train_x[batch] * np.exp(0.4 * brightness + 0.4 * tint), 0, 1)
    params, state = step(params, state, x.astype("float32"), train_y[batch])

predicted = np.argmax(jax.jit(model.apply)(params, test_x), axis=-1)
right_ones = predicted == test_y
print(f"Accuracy on held-out crops: {right_ones.mean():.1%}")
for label, name in enumerate(classes):
    print(f"{name:9} {right_ones[test_y == label].mean():.0%}")
taken = ((test_y == 1) & (predicted == 0)).sum()
print(f"{taken} of {(~right_ones).sum()} errors: landscape is taken for tower")

# %% [markdown]
# ## CRAFT finds the concepts of a class
#
# The network was only told which crops are `tower`. What does it take a tower to be? CRAFT cuts
# patches out of crops of this class, enlarges them, and writes their activations at one layer as
# sums of a few concepts. A concept is a direction in the channels of the layer, here the 48
# channels of the third ReLU, `relu_2`.
#
# `split` cuts the model at this layer: the first part computes activations, and the second makes
# logits of them.

# %%
from xplique.concepts import CraftTf

from xplique_flax import FlaxWrapper

wrapped = FlaxWrapper(model, params, input_shape=(48, 48, 3))
features, head = wrapped.split("relu_2")
craft = CraftTf(features, head, number_of_concepts=3, patch_size=16, batch_size=80)

rng = np.random.default_rng(3)
some_x, some_y = crops(right, 320, rng, zooms=[0.6, 1.0])
towers = some_x[some_y == 0]
patches, strengths, bank = craft.fit(towers, class_id=0)
print(f"{len(patches)} patches, {len(bank)} concepts in {bank.shape[1]} channels")

# %% [markdown]
# How important is a concept to the class? CRAFT weakens the concepts by random factors and watches
# the logit. The importance of a concept is its total Sobol index: the share of the logit's variance
# in which it has a part.

# %%
importances = craft.estimate_importance(towers[:5], nb_design=128)
listed = ", ".join(f"{importance:.2f}" for importance in importances)
print(f"Importances: {listed}; sum {importances.sum():.2f}")

# %% [markdown]
# !!! warning "Look at the sum of the importances"
#     In theory total indices add up to at least 1. A sum far below means that `nb_design`, the
#     number of random factors, is too small. It is 32 by default.
#
# Each row shows the patches in which a concept is strongest:

# %% alt="Three rows of eight patches, one row for each concept. Most patches of the first are dark: doors, columns and the shade under painted eaves. The second has pale sky, the third orange roof tiles, some of them in stripes."
order = importances.argsort()[::-1]
figure, rows = plt.subplots(3, 8, figsize=(8, 3.7))
figure.subplots_adjust(0, 0, 1, 0.93, 0.08, 0.3)
for row, concept in zip(rows, order):
    strongest = strengths[:, concept].argsort()[::-1]
    for axes, patch in zip(row, strongest):
        axes.imshow(np.clip(patches[patch], 0, 1), interpolation="nearest")
        axes.axis("off")
    title = f"Concept {concept}, importance {importances[concept]:.2f}"
    row[0].set_title(title, loc="left", fontsize=10)
plt.show()

# %% [markdown]
# Each row can be named: the dark woodwork under the eaves, the sky behind the tower, the orange
# tiles of its roofs. Nobody told the network, or CRAFT, that a tower has roofs.
#
# An importance has no sign. The sky matters to the logit of `tower`, and may speak for it or
# against it: Holistic CRAFT, below, tells which.
#
# !!! warning "What CRAFT needs"
#     - Activations without negative numbers: cut behind a ReLU. Elsewhere `fit` ends with
#       `Activations must be positive`.
#     - Logits: if the model ends in a softmax, [`truncate`](../guide/wrap.md#truncate) it first.
#     - A layer that everything goes through: in a residual network one behind a sum.
#
# ## Where the concepts are
#
# The network takes images of any size, and a wrapped model has one size. So it is wrapped once more
# for whole photographs. `transform` tells how much of each concept is at each place. What is to the
# left of the dashed line was used neither in training nor by CRAFT.

# %% alt="Three maps of the photograph of the tower, one for each concept. The first lights up on the shaded storeys and eaves of the tower, and less on bushes and trees. The second lights up on sky and lake, and not on the tower. The third lights up on the tiles of the roofs."
photos = np.stack([china, flower]).astype("float32")
whole = FlaxWrapper(model, params, input_shape=photos.shape[1:])
activations = whole.truncate("relu_2").predict(photos, verbose=0)
amounts = craft.transform(photos, activations)[0]

figure, row = plt.subplots(1, 3, figsize=(8, 2.1), layout="constrained")
gray = china[::4, ::4].mean(axis=-1)
options = {"interpolation": "nearest", "extent": extent}
for axes, concept in zip(row, order):
    axes.imshow(gray, cmap="gray", **options)
    axes.imshow(amounts[..., concept], alpha=0.6, **options)
    axes.axvline(middles[0], color="white", linestyle="--")
    axes.set_title(f"Concept {concept}", fontsize=10)
    axes.axis("off")
plt.show()

# %% [markdown]
# Each concept is where its patches would make you look for it, on the left too. The first is also
# found in bushes and trees, which fits the errors above: landscape that is taken for tower. The
# frame of the maps comes from the zeros that the convolutions put around an image.
#
# ??? tip "Several classes"
#     `CraftManagerTf` takes inputs and labels of several classes, and makes a `CraftTf` for each.

# %% [markdown]
# ## TCAV tests a concept of your own
#
# TCAV goes the other way: you show examples of a concept, and it tells for which classes the
# concept speaks. A linear classifier learns to tell the activations of the examples from those of
# other images. The normal of its boundary is the *concept activation vector*, or CAV. The TCAV
# score of a class is the share of its images whose logit rises in that direction.
#
# Three concepts need no labeling by hand: the 600 crops of the training half that are the most
# orange, the greenest, and the richest in fine detail.

# %%
red, green, blue = np.moveaxis(train_x, -1, 0)
properties = {
    "orange": (red - blue).mean(axis=(1, 2)),
    "green": (green - red).mean(axis=(1, 2)),
    "fine detail": abs(np.diff(train_x.mean(axis=-1))).mean(axis=(1, 2)),
}
examples = {name: values.argsort()[-600:] for name, values in properties.items()}
for name, chosen in examples.items():
    shares = np.bincount(train_y[chosen], minlength=4) / len(chosen)
    print(f"{name:11}", *[f"{label} {share:.0%}" for label, share in zip(classes, shares)])

# %% [markdown]
# Any two sets of images have a CAV, and any direction has scores. So the check is a fourth
# "concept": random crops against random crops. And each concept gets four CAVs, from four samples
# of its examples and of the other crops, to see whether they agree. The scores are those of
# held-out crops.
#
# `Cav` gives a vector of the layer's shape, with numbers for each place. A color or a texture may
# be anywhere in a crop, so these vectors are averaged over the places; `Tcav` takes any shape that
# broadcasts.

# %%
from xplique.concepts import Cav, Tcav

tf.keras.utils.disable_interactive_logging()  # no progress bars
tf.keras.utils.set_random_seed(0)  # for the classifiers

cav, tcav = Cav(wrapped, "relu_1"), Tcav(wrapped, "relu_1")
everything = np.arange(len(train_x))
examples["random"] = everything
scores = {name: np.empty((4, 4)) for name in examples}
for name, chosen in examples.items():
    others = everything if name == "random" else np.setdiff1d(everything, chosen)
    for row in scores[name]:
        positive = train_x[rng.choice(chosen, 64, replace=False)]
        negative = train_x[rng.choice(others, 64, replace=False)]
        vector = tf.reduce_mean(cav(positive, negative), axis=(0, 1))
        for label in range(4):
            row[label] = tcav(test_x[test_y == label][:64], label, vector)

# %% alt="Four panels, for the concepts orange, green, fine detail, and random. Each has three example crops on top, and below four dots for each of the four classes, at their TCAV scores. Orange has the dots of dahlia at 1 and all others near 0. Green has those of leaves at 1 and the others at 0, but for one of dahlia. Fine detail has those of tower and landscape at 1 and those of dahlia and leaves at 0. For random, each class has dots near 0 and near 1."
ratios = {"height_ratios": [1, 3]}
figure, axes = plt.subplots(2, 4, figsize=(8, 3.3), layout="constrained", **ratios)
for (top, bottom), (name, chosen) in zip(axes.T, examples.items()):
    shown = train_x[rng.choice(chosen, 3, replace=False)]
    top.imshow(np.hstack(shown), interpolation="nearest")
    top.set_title(name, fontsize=11)
    top.axis("off")
    for label, values in enumerate(scores[name].T):
        heights = label + np.linspace(-0.2, 0.2, 4)
        bottom.plot(values, heights, "o", alpha=0.7, color="C0")
    bottom.set(xlim=(-0.08, 1.08), ylim=(3.5, -0.5), xlabel="TCAV score")
    bottom.set_yticks(range(4), classes if name == "orange" else [""] * 4)
    bottom.grid(axis="y", alpha=0.4)
plt.show()

# %% [markdown]
# Each dot is one CAV. Orange speaks for `dahlia`, green for `leaves`, and fine detail for `tower` and
# for `landscape`, which has trees. With one exception, the dots of a concept agree.
#
# Those of random crops do not: in each class some are near 0 and some near 1, and none means
# anything. So trust no single CAV. The paper takes many more of them, and a t-test between those of
# a concept and random ones.
#
# A CAV is about its examples, whatever name they are given. All examples of orange are petals, and
# here it does not speak for `tower`, although the tower has orange tiles.
#
# !!! warning "Choose a layer that is followed by ReLUs"
#     Where the rest of the model is linear, the logit rises in a direction either for all images or
#     for none, and each score is 0 or 1.

# %% [markdown]
# ## Holistic CRAFT: both photographs, all classes
#
# Holistic CRAFT needs neither patches nor a class to find concepts: it factorizes the activations
# of all places of its images. Importances come later, for any class, by an attribution method in
# the space of concepts. Here both photographs give five concepts.
#
# It takes the model as an extractor, which Xplique's builder makes of a wrapped model and the index
# of a layer.

# %%
from xplique.commons.operators import predictions_operator
from xplique.concepts.tf import HolisticCraftTf
from xplique.concepts.tf.layered_model_latent_extractor import (
    LayeredModelExtractorBuilder,
)

names = [layer.name for layer in whole.layers]
extractor = LayeredModelExtractorBuilder.build(whole, names.index("relu_2"))
holistic = HolisticCraftTf(extractor, number_of_concepts=5)
holistic.fit(photos)
amounts = holistic.transform()
print(f"{amounts.shape[-1]} concepts at {amounts.shape[1:3]} places")

# %% alt="Ten maps: five concepts in columns, the photograph of the tower in the upper row and that of the dahlia in the lower one. One lights up on the leaves alone. Two light up on the dahlia, one on its outer and one on its inner petals; the former also on pale parts of the tower. One lights up on the dark parts of the tower, on bushes and trees, and one on the sky and the lake."
figure, columns = plt.subplots(2, 5, figsize=(8, 2.5), layout="constrained")
for concept, column in enumerate(columns.T):
    for axes, amount in zip(column, amounts[..., concept]):
        options = {"vmax": amounts[..., concept].max(), "interpolation": "nearest"}
        axes.imshow(amount[::2, ::2], vmin=0, **options)
        axes.axis("off")
    column[0].set_title(f"Concept {concept}", fontsize=10)
plt.show()

# %% [markdown]
# The maps divide the photographs much as you would: leaves, outer petals with pale parts of the
# tower, inner petals, dark parts of the tower with bushes and trees, sky with lake.
#
# How much does each of them contribute to each logit? By default importances are the mean of
# absolute values. With the two options below they keep their sign: amount times gradient, summed
# over all places. `tower` and `landscape` are asked about the first photograph, `dahlia` and
# `leaves` about the second. `predictions_operator` is Xplique's name for what is explained: the
# output that `class_id` selects.

# %% output="markdown"
contributions = np.empty((5, 4))
for label in range(4):
    contributions[:, label] = holistic.estimate_importance(
        photos[[label // 2]],
        predictions_operator,
        class_id=label,
        abs_before_reduce=False,
        spatial_reducer="sum",
    )

print("| Concept |", " | ".join(classes), "|")
print("| :-- |" + " --: |" * 4)
for concept, row in enumerate(contributions):
    print(f"| {concept} |", " | ".join(f"{value:+.1f}" for value in row), "|")

# %% [markdown]
# The leaves speak for `leaves` and against `dahlia`, the petals the other way round. The sky speaks
# for `landscape` most of all, and for `tower` too.

# %%
answers = whole.predict(photos, verbose=0).argmax(axis=-1)
print("Whole photographs:", ", ".join(classes[answer] for answer in answers))

# %% [markdown]
# Most of the first photograph is landscape and most of the second is leaves. So says the network,
# and the table names the concepts that decide: the sky and the leaves.
#
# ## What to keep in mind
#
# - The number of concepts is yours to choose. A concept that mixes things, as petals with parts of
#   the tower, asks for more of them.
# - CRAFT's concepts are those that reconstruct the activations well. Whether they have a name, you
#   have to see.
# - The numbers of the concepts mean nothing. Concept 0 of CRAFT is another one than concept 0 of
#   Holistic CRAFT.

# %% [markdown]
# ## Sources
#
# - TCAV: Kim, Wattenberg, Gilmer, Cai, Wexler, Viegas and Sayres (2018), [*Interpretability Beyond
#   Feature Attribution: Quantitative Testing with Concept Activation
#   Vectors*](https://arxiv.org/abs/1711.11279)
# - CRAFT: Fel, Picard, Béthune, Boissin, Vigouroux, Colin, Cadène and Serre (2023), [*CRAFT: Concept
#   Recursive Activation FacTorization for Explainability*](https://arxiv.org/abs/2211.10154)
# - Holistic CRAFT: Fel, Boutin, Moayeri, Cadène, Béthune, Andéol, Chalvidal and Serre (2023), [*A
#   Holistic Approach to Unifying Automatic Concept Extraction and Concept Importance
#   Estimation*](https://arxiv.org/abs/2306.07304)
