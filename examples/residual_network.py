# %% [markdown]
# # Grad-CAM in a residual network
#
# You will have trained a residual network with batch normalization and nested modules,
# looked into its layers by name, and made Grad-CAM and Grad-CAM++ maps at several of
# them. As the true place of the digit in each scene is known, the page measures where
# the maps point: near the input hardly more often at the digit than by chance, in the
# last block nearly always.

# %% [markdown]
# ## Scenes with one digit among fragments
#
# Each scene holds one of scikit-learn's handwritten digits, at a random place among six
# fragments of other digits. Digits of the test set are in none of the training scenes.

# %%
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

images, digits = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
split = train_test_split(images, digits, random_state=0)
train_images, test_images, train_digits, test_digits = split
rng = np.random.default_rng(0)


def compose(images, digits, number):
    scenes = np.zeros((number, 32, 32, 1), "float32")
    chosen = rng.integers(len(images), size=number)
    corners = rng.integers(25, size=(number, 2))
    for scene, index, (top, left) in zip(scenes, chosen, corners):
        for fragment in images[rng.integers(len(images), size=6)]:
            (y, x), (i, j) = rng.integers(29, size=2), rng.integers(5, size=2)
            scene[y : y + 4, x : x + 4] = fragment[i : i + 4, j : j + 4]
        scene[top : top + 8, left : left + 8] = images[index]
    return scenes, digits[chosen], corners


train_x, train_y, _ = compose(train_images, train_digits, 12000)
test_x, test_y, corners = compose(test_images, test_digits, 1000)

# %% [markdown]
# ## The network
#
# Two stages of two blocks each. A block adds what its convolutions make to what it was
# given; where it halves the size, a convolution of size 1 brings the skip connection to
# the new shape. At the end the mean over all places and a softmax. Each class of the
# code below becomes a level in the names of the layers.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Block(nn.Module):
    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x, train):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x)
        y = nn.Conv(self.features, (3, 3), use_bias=False)(nn.relu(norm(y)))
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False)(x)
        return nn.relu(x + norm(y))


class Stage(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        x = Block(self.features, strides=2)(x, train)
        return Block(self.features)(x, train)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = Stage(16)(x, train)
        x = Stage(32)(x, train)
        return nn.softmax(nn.Dense(10)(x.mean(axis=(1, 2))))


model = ResNet()
variables = jax.jit(model.init, static_argnames="train")(
    jax.random.PRNGKey(0), train_x[:1], train=False
)
steps = 400
optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 1.5e-2))
state = optimizer.init(variables["params"])


def loss(params, batch_stats, x, y):
    variables = {"params": params, "batch_stats": batch_stats}
    outputs, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    probability = (outputs * jax.nn.one_hot(y, 10)).sum(-1)
    return -jnp.log(probability + 1e-6).mean(), updated["batch_stats"]


@jax.jit
def step(variables, state, x, y):
    params, batch_stats = variables["params"], variables["batch_stats"]
    gradient, batch_stats = jax.grad(loss, has_aux=True)(params, batch_stats, x, y)
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return {"params": params, "batch_stats": batch_stats}, state


for _ in range(steps):
    batch = rng.choice(len(train_x), 48)
    variables, state = step(variables, state, train_x[batch], train_y[batch])

outputs = jax.jit(lambda x: model.apply(variables, x, train=False))(test_x)
predicted = np.array(outputs.argmax(-1))
print(f"Accuracy on held-out scenes: {(predicted == test_y).mean():.1%}")

# %% [markdown]
# ## Its layers
#
# The network has a flag, `train`, and a collection of its own, `batch_stats`. Both go
# into the wrapper, and so does `input_shape`, which is what makes the layers.

# %%
from xplique_flax import FlaxWrapper

shape, flags = (32, 32, 1), {"train": False}
wrapped = FlaxWrapper(model, variables, input_shape=shape, apply_kwargs=flags)
wrapped.summary(line_length=88, positions=[0.46, 0.71, 0.81, 1.0])

# %% [markdown]
# A layer is named by the path of its module: `Stage_1.Block_0.Conv_1` is the second
# convolution in the first block of the second stage. Three things beside the modules
# are layers, too. Each ReLU is one, so `Stage_1.Block_0.relu` is the ReLU between the
# two convolutions. What else happens between modules and ReLUs is named by the last
# thing that it does: `Stage_1.Block_0.add` is the sum of the skip connection and the
# rest. And a module made of others has a layer of its own name, for its output.
#
# ## Activations
#
# `get_layer` gives a layer, and `tf.keras.Model` makes a model of what lies between the
# inputs and its output, as for any Keras functional model. The activations are those
# that Flax computes.

# %%
import tensorflow as tf

layer = wrapped.get_layer("Stage_0.Block_1")
features = tf.keras.Model(wrapped.inputs, layer.output)
few = test_x[:4]
activations = np.array(features([few]))

_, captured = model.apply(variables, few, train=False, capture_intermediates=True)
in_flax = captured["intermediates"]["Stage_0"]["Block_1"]["__call__"][0]
print(f"{layer.name}: {activations.shape}")
print(f"Largest difference from Flax: {np.abs(activations - in_flax).max():.1e}")

# %% alt="Two rows of six pictures. On the left scenes with a digit, marked by an orange box, among fragments of digits. To the right of each the five strongest channels of its activations: bright spots on the digit, and faint ones on some of the fragments."
import matplotlib.pyplot as plt


def draw_box(axes, index):
    top, left = corners[index] - 0.5
    x, y = [left, left + 8, left + 8, left, left], [top, top, top + 8, top + 8, top]
    axes.plot(x, y, color="orange", linewidth=1.5)


figure, rows = plt.subplots(2, 6, figsize=(8, 2.9), layout="constrained")
for index, row in enumerate(rows):
    row[0].imshow(test_x[index], cmap="gray")
    draw_box(row[0], index)
    strongest = activations[index].max((0, 1)).argsort()[::-1]
    for axes, channel in zip(row[1:], strongest):
        axes.imshow(activations[index, ..., channel])
        axes.set_title(f"channel {channel}", fontsize=9)
for axes in rows.flat:
    axes.axis("off")
plt.show()

# %% [markdown]
# ## Logits instead of probabilities
#
# The model ends in a softmax, whose gradient fades where the model is sure of its
# answer. `wrapped.truncate` gives the model up to a layer, here the one before the
# softmax. The difference shows in the size of the gradients: the largest value of each
# Saliency map, for scenes that are classified rightly.

# %%
from xplique.attributions import Saliency

logits = wrapped.truncate("Dense_0")

right = np.flatnonzero(predicted == test_y)[:128]
inputs, targets = test_x[right], np.eye(10, dtype="float32")[test_y[right]]

saliency = {}
for name, explained in {"probabilities": wrapped, "logits": logits}.items():
    saliency[name] = np.array(Saliency(explained, batch_size=16)(inputs, targets))
    largest = saliency[name].max((1, 2, 3))
    print(f"{name}: from {largest.min():.5f} to {largest.max():.5f}")

# %% [markdown]
# !!! tip "`truncate` does what `output_layer` should"
#     Xplique's explainers have an argument `output_layer` for this. In Xplique 2.0.2 it
#     has no effect, for native Keras models neither: the
#     [limitations](../guide/limitations.md) show it.
#
# ## Grad-CAM at any layer
#
# `conv_layer` takes the name of any layer whose output has places and channels: a
# convolution, a normalization, a ReLU, a sum, a whole block. Without it, the last
# convolution is used. Nine layers follow: the first ReLU, and in each block the second
# convolution and the output.

# %%
from xplique.attributions import GradCAM, GradCAMPP

blocks = [f"Stage_{i}.Block_{j}" for i in range(2) for j in range(2)]
layers = ["relu"]
for block in blocks:
    layers += [f"{block}.Conv_1", block]

maps = {"Grad-CAM": {}, "Grad-CAM++": {}}
for name in layers:
    for method, Explainer in zip(maps, (GradCAM, GradCAMPP)):
        explainer = Explainer(logits, conv_layer=name, batch_size=16)
        maps[method][name] = np.array(explainer(inputs, targets))

# %% alt="A grid of pictures, one row for each of four scenes: the scene with its digit marked by an orange box, and its Grad-CAM maps at the first ReLU and at the four blocks. The first maps are scattered dots on digit and fragments; from block to block they gather into one bright spot, which grows and lies on the digit."
figure, rows = plt.subplots(4, 6, figsize=(8, 5.9), layout="constrained")
for index, row in enumerate(rows):
    row[0].imshow(inputs[index], cmap="gray")
    draw_box(row[0], right[index])
    for axes, name in zip(row[1:], ["relu", *blocks]):
        axes.imshow(maps["Grad-CAM"][name][index])
        draw_box(axes, right[index])
        if index == 0:
            axes.set_title(name, fontsize=9)
for axes in rows.flat:
    axes.axis("off")
plt.show()

# %% [markdown]
# ## The pointing game
#
# A map $E_i$ of a scene scores a point if its maximum lies in the square $B_i$ of the
# true digit, so that the result is the share
#
# $$\frac{1}{N} \sum_{i=1}^{N} \Big[\, \operatorname{arg\,max}_p E_i(p) \in B_i \Big].$$
#
# A map that knows nothing would pick any pixel, or any pixel with ink: the last two
# rows.

# %% output="markdown"
places = np.zeros((len(inputs), 32, 32), bool)
for place, (top, left) in zip(places, corners[right]):
    place[top : top + 8, left : left + 8] = True


def pointing(explanations):
    flat = np.reshape(explanations, (len(places), -1))
    return places.reshape(flat.shape)[range(len(flat)), flat.argmax(1)].mean()


print("| Layer | Its size | Grad-CAM | Grad-CAM++ |\n| --- | --- | ---: | ---: |")
for name in layers:
    size = "×".join(str(n) for n in logits.get_layer(name).output.shape[1:3])
    hits = " | ".join(f"{pointing(maps[method][name]):.0%}" for method in maps)
    print(f"| `{name}` | {size} | {hits} |")
ink = inputs[..., 0] > 0.2
for chance, picked in {"any pixel": np.ones_like(ink), "any ink": ink}.items():
    share = ((picked & places).sum((1, 2)) / picked.sum((1, 2))).mean()
    print(f"| Chance: {chance} | | {share:.0%} | {share:.0%} |")

# %% [markdown]
# At the first ReLU Grad-CAM sees edges, and a fragment has edges like a digit: it is a
# little better than picking any ink, and Grad-CAM++ a little worse. The next layers
# tell the digit from the fragments better and better. The first block of the second
# stage falls back a little, but its misses are near: one of its places is four pixels
# wide.
#
# The papers take a layer after its ReLU, here the blocks. `Conv_1` lies before the
# normalization, the sum and the ReLU; here it points no worse.
#
# Grad-CAM says what a layer has found out, in the words of the layers after it. So look
# at more than one, and do not take a blurred map of the last layer for all that the
# model looked at.
#
# ## Guided Backprop and DeconvNet
#
# Both replace the gradient of each ReLU, and find the ReLUs of the Flax model, those in
# nested modules included.

# %%
from xplique.attributions import DeconvNet, GuidedBackprop

guided = np.array(GuidedBackprop(logits, batch_size=16)(inputs, targets))
deconvolved = np.array(DeconvNet(logits, batch_size=16)(inputs, targets))
methods = {
    "Saliency": saliency["logits"],
    "Guided Backprop": guided,
    "DeconvNet": deconvolved,
}
for name, explanations in methods.items():
    print(f"{name}: {pointing(explanations):.0%} of the maxima lie on the digit")

# %% alt="Two rows of four pictures, for two scenes with the same digit in different places: the scene, and its Saliency, Guided Backprop and DeconvNet maps. Saliency and Guided Backprop light up on the digit. DeconvNet shows a checkerboard over the whole scene, the same one in both rows."
digit = test_y[right[0]]
pair = np.flatnonzero(test_y[right] == digit)[:2]
figure, rows = plt.subplots(2, 4, figsize=(8, 4.2), layout="constrained")
for index, row in zip(pair, rows):
    row[0].imshow(inputs[index], cmap="gray")
    draw_box(row[0], right[index])
    for axes, (name, explanations) in zip(row[1:], methods.items()):
        axes.imshow(np.abs(explanations[index]))
        axes.set_title(name, fontsize=11)
for axes in rows.flat:
    axes.axis("off")
plt.show()

# %% [markdown]
# The pictures show absolute values. DeconvNet fails here, and it must. At each ReLU it
# asks for the sign of the gradient alone, never for what the scene made of it. All else
# in this network is linear, so that its map depends on the class, and on nothing else:
# two scenes with the same digit have the same map.

# %%
difference = np.abs(deconvolved[pair[0]] - deconvolved[pair[1]]).max()
print(f"Largest value of a map: {np.abs(deconvolved[pair]).max():.2f}")
print(f"Largest difference between the two: {difference:g}")

# %% [markdown]
# In networks with max pooling DeconvNet knows at least where the maxima were; one with
# strides and a mean, as this one, gives it nothing to go by. That a map looks plausible
# is not enough, and neither is that it points well: [sanity checks](sanity_checks.py)
# ask whether it depends on what was learned.
#
# Where a model gives an answer per box or per pixel, Grad-CAM points much worse than
# here: [object detection](object_detection.py) and [segmentation](segmentation.py)
# measure it, and say why.
