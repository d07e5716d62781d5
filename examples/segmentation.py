# %% [markdown]
# # Segmentation: which pixels decide one region
#
# You will have trained a fully convolutional Flax model that finds handwritten digits
# in crowded scenes, pixel by pixel, and explained single regions of its output with
# `operator="semantic segmentation"`. As the true place of each digit is known, the page
# ends with a measurement: three methods out of four nearly always point at the digit
# that they are asked about, and one often points at another digit.

# %% [markdown]
# ## Scenes of real digits
#
# Each scene is made of scikit-learn's handwritten digits, enlarged to three sizes:
# twenty times one is put at a random place if there is room. With each scene come two
# maps: `labels`, the class of each pixel, where 10 is the background, and `squares`,
# which numbers the squares that the digits were put in. Digits of the test set are in
# none of the training scenes.

# %%
import numpy as np
from skimage.transform import resize
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

images, digits = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8).astype("float32")
split = train_test_split(images, digits, random_state=0)
train_images, test_images, train_digits, test_digits = split
rng = np.random.default_rng(0)


def compose(images, digits, number):
    enlarged = [[resize(image, (n, n)) for n in (10, 12, 14)] for image in images]
    scenes = np.zeros((number, 32, 32, 1), "float32")
    labels = np.full((number, 32, 32), 10)
    squares = np.zeros((number, 32, 32), "int32")
    for scene, label, square in zip(scenes, labels, squares):
        for count in range(1, 21):
            index = rng.integers(len(images))
            picture = enlarged[index][rng.integers(3)]
            size = len(picture)
            top, left = rng.integers(0, 33 - size, size=2)
            place = slice(top, top + size), slice(left, left + size)
            if not square[place].any():
                scene[place] = picture[..., None]
                label[place][picture > 0.25] = digits[index]
                square[place] = count
    return scenes, labels, squares


train_x, train_y, _ = compose(train_images, train_digits, 12000)
test_x, test_y, test_squares = compose(test_images, test_digits, 300)
print(f"Pixels with ink in the test scenes: {(test_y < 10).mean():.1%}")

# %% [markdown]
# ## A fully convolutional model
#
# An encoder reduces the scene to a quarter and an eighth of its size, a decoder
# enlarges it again and takes in what the encoder saw at that size. The output has the
# shape $(N, 32, 32, 11)$: one probability per pixel and class. Probabilities, not
# logits, are what Xplique's operator for segmentation expects.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Segmenter(nn.Module):
    @nn.compact
    def __call__(self, x):
        half = nn.relu(nn.Conv(24, (5, 5), strides=2)(x))
        x = nn.relu(nn.Conv(48, (3, 3), strides=2)(half))
        quarter = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.relu(nn.Conv(96, (3, 3), strides=2)(quarter))
        x = nn.relu(nn.Conv(96, (3, 3))(x))
        x = jnp.concatenate([double(x), quarter], axis=-1)
        x = nn.relu(nn.Conv(48, (3, 3))(x))
        x = jnp.concatenate([double(x), half], axis=-1)
        x = nn.Dense(4 * 11)(nn.relu(nn.Dense(48)(x)))
        # Each place of the 16 x 16 grid holds the classes of 2 x 2 pixels.
        x = x.reshape(-1, 16, 16, 2, 2, 11).transpose(0, 1, 3, 2, 4, 5)
        return nn.softmax(x.reshape(-1, 32, 32, 11))


def double(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


model = Segmenter()
params = jax.jit(model.init)(jax.random.PRNGKey(0), train_x[:1])
steps = 700
optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 1e-2))
state = optimizer.init(params)


def loss(params, x, y):
    truth = jax.nn.one_hot(y, 11)
    weights = jnp.where(y < 10, 3, 1)  # most pixels are background
    probability = (model.apply(params, x) * truth).sum(-1)
    return -(weights * jnp.log(probability + 1e-6)).mean()


@jax.jit
def step(params, state, x, y):
    gradient = jax.grad(loss)(params, x, y)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


for _ in range(steps):
    batch = rng.choice(len(train_x), 32)
    params, state = step(params, state, train_x[batch], train_y[batch])

# %% [markdown]
# Quality on held-out scenes is the mean over the classes of the intersection over
# union,
#
# $$\mathrm{IoU}_c = \frac{|P_c \cap T_c|}{|P_c \cup T_c|},$$
#
# where $P_c$ are the pixels that the model gives the class $c$, and $T_c$ those that
# have it.

# %%
probabilities = np.array(jax.jit(model.apply)(params, test_x))
predicted = probabilities.argmax(-1)


def iou(c):
    found, true = predicted == c, test_y == c
    return (found & true).sum() / (found | true).sum()


print(f"Mean IoU, 11 classes: {np.mean([iou(c) for c in range(11)]):.2f}")
print(f"Mean IoU, digits alone: {np.mean([iou(c) for c in range(10)]):.2f}")
print(f"Ink with the right class: {(predicted == test_y)[test_y < 10].mean():.1%}")

# %% alt="Two rows of six pictures: scenes with two to four handwritten digits each, and below them the predicted class of every pixel as a color. Most digits have one color from end to end; where two of them touch, a few pixels have a third color."
import matplotlib.pyplot as plt

figure, rows = plt.subplots(2, 6, figsize=(8, 3), layout="constrained")
for axes, scene, classes in zip(rows.T, test_x, predicted):
    axes[0].imshow(scene, cmap="gray")
    axes[1].imshow(0 * scene + 0.85, cmap="gray", vmin=0, vmax=1)
    drawn = axes[1].imshow(
        np.where(classes < 10, classes, np.nan), cmap="tab10", vmin=-0.5, vmax=9.5
    )
for axes in rows.flat:
    axes.axis("off")
rows[0, 0].set_title("Scenes", loc="left")
rows[1, 0].set_title("Predicted classes", loc="left")
figure.colorbar(drawn, ax=rows, ticks=range(10), label="class")
plt.show()

# %% [markdown]
# ## A target is a region and a class
#
# The wrapper is called as in every other task. What is particular to segmentation is
# the target: an array of the output's shape, zero but for the pixels and the class in
# question. The operator explains the mean probability of the class $c$ over the region
# $Z$,
#
# $$s(x) = \frac{1}{|Z|} \sum_{p \in Z} f_c(x)_p.$$
#
# Xplique makes such targets from the model's own predictions: `get_connected_zone`
# takes one pixel and returns the connected region of the same class around it, and
# `list_class_connected_zones` returns all regions of one class above a size in pixels.
# Here are all the regions of one scene.

# %%
from xplique.utils_functions.segmentation import list_class_connected_zones

from xplique_flax import FlaxWrapper

wrapped = FlaxWrapper(model, params, input_shape=(32, 32, 1))

chosen = 17
zones = [
    zone.numpy()
    for digit in range(10)
    for zone in list_class_connected_zones(probabilities[chosen], digit, 20)
]
targets = np.stack(zones)
inputs = np.repeat(test_x[chosen : chosen + 1], len(targets), axis=0)
print(f"inputs {inputs.shape}, targets {targets.shape}")
for zone in zones:
    print(f"class {zone.sum((0, 1)).argmax()}: {zone.sum():.0f} pixels")

# %% [markdown]
# To explain all of them, the scene was repeated: each copy has a target of its own.
# Grad-CAM gets the name of the layer to look at, the last convolution.

# %%
from xplique.attributions import GradCAM, IntegratedGradients, Occlusion, Saliency

operator = "semantic segmentation"
explainers = {
    "Saliency": Saliency(wrapped, operator=operator),
    "Integrated Gradients": IntegratedGradients(wrapped, operator=operator, steps=20),
    "Occlusion": Occlusion(
        wrapped, operator=operator, patch_size=4, patch_stride=2, batch_size=225
    ),
    "Grad-CAM": GradCAM(wrapped, conv_layer="Conv_5"),
}
maps = {name: explainer(inputs, targets) for name, explainer in explainers.items()}

# %% alt="A grid of pictures, one row for each of four digits in a scene: the region in question, and its Saliency, Integrated Gradients, Occlusion and Grad-CAM maps. The first three light up on and around the digit of the region; Grad-CAM lights up broad areas, some of them on other digits."
figure, rows = plt.subplots(len(zones), 5, figsize=(8, 6.7), layout="constrained")
for axes, name in zip(rows[0], ["Region", *maps]):
    axes.set_title(name, fontsize=11)
for index, row in enumerate(rows):
    row[0].imshow(inputs[index], cmap="gray")
    region = zones[index].max(-1)
    row[0].imshow(np.where(region > 0, 1, np.nan), vmin=0, vmax=1.2)
    for axes, explanations in zip(row[1:], maps.values()):
        values = np.array(explanations[index])
        limit = np.abs(values).max()
        axes.imshow(values, cmap="coolwarm", vmin=-limit, vmax=limit)
for axes in rows.flat:
    axes.axis("off")
plt.show()

# %% [markdown]
# Red speaks for the class, blue against it. Saliency has no sign, and Grad-CAM keeps
# what is positive; the pale blue in its maps comes from enlarging them.
#
# !!! note "Grad-CAM has no use for the operator"
#     Xplique's Grad-CAM and Grad-CAM++ accept `operator` and ignore it: they explain
#     the sum of output times target. For a region that is the operator's score, but for
#     the factor $|Z|$, so the map is the right one. For [object
#     detection](object_detection.py) it is not.
#
# ## The border of a region
#
# A target may hold negative numbers, too. `get_in_out_border` turns a region into its
# border: 1 on the pixels just inside, -1 on those just outside. The score is then how
# much more probable the class is within the border than beyond it: why does the region
# end here?

# %%
from xplique.utils_functions.segmentation import get_in_out_border

borders = np.stack([get_in_out_border(zone).numpy() for zone in zones])
of_borders = explainers["Saliency"](inputs, borders)
for zone, first, second in zip(zones, maps["Saliency"], of_borders):
    correlation = np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]
    print(f"class {zone.sum((0, 1)).argmax()}: the maps correlate by {correlation:.2f}")

# %% alt="Four pictures in a row: the region of a digit and its Saliency map, then its border, a line of ones within a line of minus ones, and the border's Saliency map. The two maps light up on the same digit, but on different pixels of it."
figure, row = plt.subplots(1, 4, figsize=(8, 2.3), layout="constrained")
pictures = {
    "Region": zones[-1].sum(-1),
    "Saliency": maps["Saliency"][-1],
    "Border": borders[-1].sum(-1),
    "Saliency of border": of_borders[-1],
}
for axes, (title, picture) in zip(row, pictures.items()):
    limit = np.abs(picture).max()
    axes.imshow(picture, cmap="coolwarm", vmin=-limit, vmax=limit)
    axes.set_title(title, fontsize=11)
    axes.axis("off")
plt.show()

# %% [markdown]
# ## Do explanations point at the right digit?
#
# In each of 48 held-out scenes one pixel of ink is drawn among those that have the
# right class, and the connected region around it is explained. The square of the digit
# that the pixel belongs to is known, and what decides should lie in it: the model
# learned from scenes in which digits stand side by side at random, so a neighbor says
# nothing.

# %%
from xplique.utils_functions.segmentation import get_connected_zone

inputs, targets, own, others = [], [], [], []
held_out = zip(test_x[:48], probabilities, test_y, test_squares)
for scene, output, label, square in held_out:
    right = np.argwhere((output.argmax(-1) == label) & (label < 10))
    row, column = rng.choice(right)
    inputs.append(scene)
    targets.append(get_connected_zone(output, (int(row), int(column))).numpy())
    own.append(square == square[row, column])
    others.append((square > 0) & (square != square[row, column]))
inputs, targets, own, others = map(np.array, (inputs, targets, own, others))


# %% output="markdown"
def at_maximum(explanations, places):
    flat = np.reshape(explanations, (len(places), -1))
    return places.reshape(len(places), -1)[range(len(places)), flat.argmax(1)].mean()


def share(explanations, places):
    positive = np.maximum(np.reshape(explanations, places.shape), 0)
    return ((positive * places).sum((1, 2)) / positive.sum((1, 2))).mean()


def report(name, explanations):
    hits, misses = at_maximum(explanations, own), at_maximum(explanations, others)
    print(f"| {name} | {hits:.0%} | {misses:.0%} | {share(explanations, own):.0%} |")


ink = inputs[..., 0] > 0.25
print("| Method | Maximum in its square | on another digit's | Share in its square |")
print("| --- | ---: | ---: | ---: |")
print(f"| Chance: any pixel | {own.mean():.0%} | {others.mean():.0%} | {own.mean():.0%} |")
on_own, on_others = share(ink, own), share(ink, others)
print(f"| Chance: any ink | {on_own:.0%} | {on_others:.0%} | {on_own:.0%} |")
for name, explainer in explainers.items():
    report(name, explainer(inputs, targets))

# %% [markdown]
# The first column is the pointing game: the maximum of the map is a hit if it lies
# within the square of the digit. The last is the share of the positive attribution that
# falls into it. The two rows of chance are what a map that knows nothing would get: one
# that picks any pixel, and one that picks any pixel with ink. The second is the fairer
# rival of Integrated Gradients, which multiplies by the input, so that it is zero
# wherever the scene is black.
#
# Saliency, Integrated Gradients and Occlusion point at the right digit nearly always.
# Grad-CAM does not, and the reason is in its formula. It weighs each channel $A^k$ of a
# layer with the gradient's mean over *all* places,
#
# $$\mathrm{ReLU}\Big(\sum_k \alpha_k A^k\Big), \qquad
# \alpha_k = \frac{1}{HW} \sum_{i,j} \frac{\partial s}{\partial A^k_{ij}},$$
#
# and so forgets where in the scene the region was. A channel that speaks for the region
# lights up wherever it is active, on other digits too. For a model that gives one
# answer for the whole image that is no loss: there Grad-CAM [does very
# well](residual_network.py).
#
# ??? tip "Other methods, other models"
#     All methods but Grad-CAM, Grad-CAM++ and FEM use the `operator`; the
#     [gallery](methods_gallery.py) shows all 17. If your model returns logits, put the
#     softmax into the module or wrap a `method` that applies it. If it returns several
#     arrays, choose one with `output`: both are described in [Step
#     2](../guide/wrap.md).
