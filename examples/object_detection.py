# %% [markdown]
# # Object detection: what one box rests on
#
# You will have trained a small detector in Flax whose output has the format that
# Xplique asks for, and explained single detections with `operator="object detection"`:
# the whole of a detection, or its position and its class apart. The scenes are composed
# of real digits, so the true boxes are known, and the page measures how often each
# method points into the right one. Three methods nearly always do. Grad-CAM does not,
# and a few lines on the wrapped model show what it lacks.

# %% [markdown]
# ## Scenes with known boxes
#
# Scikit-learn's handwritten digits are cut out along their ink, enlarged to three
# sizes, and put wherever a scene is still empty. Digits of the test set are in none of
# the training scenes.
#
# The truth is written down as the detector will answer: one row for each cell of a 4 ×
# 4 grid, made of a box, a number that says whether there is an object, and the class,
# one-hot. An object belongs to the cell that its center lies in.

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


def cut_out(image):
    rows, columns = np.nonzero(image > 0.2)
    return image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def compose(images, digits, number):
    cut = [cut_out(image) for image in images]
    sizes = 1, 1.25, 1.5
    enlarged = [[resize(c, np.multiply(c.shape, s)) for s in sizes] for c in cut]
    scenes = np.zeros((number, 32, 32, 1), "float32")
    truth = np.zeros((number, 4, 4, 15), "float32")
    for scene, cells in zip(scenes, truth):
        for _ in range(12):
            index = rng.integers(len(images))
            picture = enlarged[index][rng.integers(len(sizes))]
            height, width = picture.shape
            top, left = rng.integers((33 - height, 33 - width))
            place = scene[top : top + height, left : left + width, 0]
            cell = cells[int(top + height / 2) // 8, int(left + width / 2) // 8]
            if not place.any() and not cell.any():
                place[:] = picture
                cell[:5] = left, top, left + width, top + height, 1
                cell[5 + digits[index]] = 1
    return scenes, truth.reshape(number, 16, 15)


train_x, train_y = compose(train_images, train_digits, 12000)
test_x, test_y = compose(test_images, test_digits, 400)
print(f"Digits per scene: {test_y[..., 4].sum(1).mean():.1f}")

# %% [markdown]
# ## A detector in Xplique's format
#
# Xplique's operator for object detection takes an output of shape $(N, \text{boxes}, 4
# + 1 + \text{classes})$. Each row holds
#
# - the box, as `left, top, right, bottom`: the smaller coordinate first, in any unit, as long as the
#   targets have the same one;
# - the probability that there is an object;
# - the probabilities of the classes.
#
# Leave non-maximum suppression out of the model. The operator looks among all boxes for
# the one that is most like the target, and the gradient must get through.
#
# If your model gives boxes by center and size, as many do, convert them in the module,
# or in a function that you pass as `method` or `output`: [Step 2](../guide/wrap.md)
# shows how.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

middle = np.arange(4) * 8 + 4
centers = np.stack(np.meshgrid(middle, middle), axis=-1).reshape(16, 2)


class Detector(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(24, (5, 5), strides=2)(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.relu(nn.Conv(96, (3, 3), strides=2)(x))
        x = nn.Conv(15, (1, 1), name="boxes")(x).reshape(-1, 16, 15)
        center = centers + 4 * nn.tanh(x[..., :2])
        half = 4 * jnp.exp(x[..., 2:4])
        there, classes = nn.sigmoid(x[..., 4:5]), nn.softmax(x[..., 5:])
        return jnp.concatenate([center - half, center + half, there, classes], -1)


def iou(a, b):
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., 2:4], b[..., 2:4])
    shared = jnp.prod(jnp.maximum(high - low, 0), -1)
    areas = [jnp.prod(box[..., 2:4] - box[..., :2], -1) for box in (a, b)]
    return shared / (areas[0] + areas[1] - shared)


model = Detector()
params = jax.jit(model.init)(jax.random.PRNGKey(0), train_x[:1])
steps = 900
optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 8e-3))
state = optimizer.init(params)


def loss(params, x, truth):
    boxes = model.apply(params, x)
    there, p = truth[..., 4], jnp.clip(boxes[..., 4], 1e-6, 1 - 1e-6)
    presence = -there * jnp.log(p) - (1 - there) * jnp.log(1 - p)
    classes = -(truth[..., 5:] * jnp.log(boxes[..., 5:] + 1e-6)).sum(-1)
    position = there * (1 - iou(truth, boxes))
    return (presence + classes + 2 * position).sum(1).mean()


@jax.jit
def step(params, state, x, y):
    gradient = jax.grad(loss)(params, x, y)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


for _ in range(steps):
    batch = rng.choice(len(train_x), 32)
    params, state = step(params, state, train_x[batch], train_y[batch])

# %% [markdown]
# A detection is a row whose object is more probable than not. A digit of a held-out
# scene is found if a detection of its class overlaps its box by half or more, measured
# as intersection over union.

# %%
outputs = np.array(jax.jit(model.apply)(params, test_x))
detected, true = outputs[..., 4] > 0.5, test_y[..., 4] > 0
overlaps = np.array(iou(test_y[:, :, None], outputs[:, None]))
good = (overlaps >= 0.5) & true[:, :, None] & detected[:, None]
same = test_y[:, :, None, 5:].argmax(-1) == outputs[:, None, :, 5:].argmax(-1)
found = (good & same).any(-1)
print(f"Boxes found, whatever the class: {good.any(-1).sum() / true.sum():.1%}")
print(f"Digits found (recall): {found.sum() / true.sum():.1%}")
print(f"Detections that are right (precision): {found.sum() / detected.sum():.1%}")

# %% alt="Five scenes in a row, each with four to six handwritten digits. Around nearly every digit is an orange box, close to its ink, and above the box the detected class."
import matplotlib.pyplot as plt


def draw_box(axes, detection, label=""):
    left, top, right, bottom = detection[:4] - 0.5
    corners = [left, right, right, left, left], [top, top, bottom, bottom, top]
    axes.autoscale(False)
    axes.plot(*corners, color="orange", linewidth=1)
    axes.text(left, top - 0.7, label, color="orange", fontsize=9)


figure, row = plt.subplots(1, 5, figsize=(8, 1.8), layout="constrained")
for axes, scene, boxes in zip(row, test_x, outputs):
    axes.imshow(scene, cmap="gray")
    axes.axis("off")
    for detection in boxes[boxes[:, 4] > 0.5]:
        draw_box(axes, detection, detection[5:].argmax())
plt.show()

# %% [markdown]
# ## Explain each detection of a scene
#
# The target is the detection itself: a row of the output. For a scene $x$ and a
# detection with the box $b$ and the classes $c$, the operator explains how well it is
# found again,
#
# $$s(x) = \max_j \; \mathrm{IoU}\big(b, b_j(x)\big) \cdot p_j(x) \cdot \cos\big(c, c_j(x)\big),$$
#
# where $j$ runs over all boxes, and $p_j$ is the probability of an object. With Rise
# this is the method known as D-RISE. To explain all detections of one scene, the scene
# is repeated.

# %%
import tensorflow as tf
from xplique.attributions import IntegratedGradients, Occlusion, Rise, Saliency

from xplique_flax import FlaxWrapper

tf.random.set_seed(0)
wrapped = FlaxWrapper(model, params, input_shape=(32, 32, 1))

common = {"operator": "object detection", "batch_size": 75}
patches = {"patch_size": 4, "patch_stride": 2}
masks = {"nb_samples": 300, "grid_size": 8, "preservation_probability": 0.7}
explainers = {
    "Saliency": Saliency(wrapped, **common),
    "Integrated Gradients": IntegratedGradients(wrapped, steps=25, **common),
    "Occlusion": Occlusion(wrapped, **patches, **common),
    "Rise": Rise(wrapped, **masks, **common),
}

chosen = 1
targets = outputs[chosen][detected[chosen]]
inputs = np.repeat(test_x[chosen : chosen + 1], len(targets), axis=0)
maps = {name: explainer(inputs, targets) for name, explainer in explainers.items()}

# %% alt="A grid of pictures, one column for each of six detections in one scene. First row: the detection's box. Below: its Saliency, Integrated Gradients, Occlusion and Rise maps. All are brightest at the digit in the box; Saliency is as bright beside the box, Rise has a faint background everywhere."
figure, rows = plt.subplots(5, len(targets), figsize=(8, 7), layout="constrained")
for axes, scene, target in zip(rows[0], inputs, targets):
    axes.imshow(scene, cmap="gray")
    draw_box(axes, target, target[5:].argmax())
for row, (name, explanations) in zip(rows[1:], maps.items()):
    row[0].set_title(name, loc="left", fontsize=11)
    for axes, explanation in zip(row, explanations):
        axes.imshow(explanation)
for axes in rows.flat:
    axes.axis("off")
plt.show()

# %% [markdown]
# Each map changes with its detection, and is brightest at that digit, or just beside it (Saliency).
# The values of Integrated Gradients have a sign: what is darker than the background speaks against
# the detection.
#
# !!! warning "Targets must be in the units of the output"
#     The score begins with the overlap of two boxes. A target in other units, such as
#     fractions of the scene where the model answers in pixels, overlaps with next to
#     nothing: the scores are close to zero, and the explanations mean nothing. No error
#     is raised. The safest target is a row of the model's own output.
#
# ## Position and class apart
#
# Further operators leave factors of the score out: `"object detection box position"`
# explains the overlap alone, `"object detection box class"` the overlap and the class,
# and `"object detection box proba"` the overlap and the presence of an object. Here are
# two of them for one of the digits, which has neighbors close by.

# %%
index = 3
pictures = {}
for part in ("box position", "box class"):
    partial = {**common, "operator": f"object detection {part}"}
    explainer = Occlusion(wrapped, **patches, **partial)
    pictures[part] = explainer(inputs, targets)[index]

# %% alt="Three pictures: a scene with a box around a digit, and the Occlusion maps of the box's position and of its class. Both are brightest on the digit; that of the position reaches out farther, to the digits beside it."
figure, row = plt.subplots(1, 3, figsize=(8, 2.9), layout="constrained")
row[0].imshow(inputs[index], cmap="gray")
draw_box(row[0], targets[index])
for axes, (part, explanation) in zip(row[1:], pictures.items()):
    axes.imshow(explanation)
    axes.set_title(part, fontsize=11)
for axes in row:
    axes.axis("off")
plt.show()

# %% [markdown]
# The box's position depends a little on the digits above and beside it, from which the network has
# to tell this one. With the class in the score, the digit's own pixels weigh more.
#
# ## Does the maximum lie in the true box?
#
# In each of 48 held-out scenes one digit is drawn among those that were found. Its
# detection is explained, and the map's maximum is looked for in three places: in the
# true box, in the box with a margin of two pixels, and in the boxes of the other
# digits.

# %%
y, x = np.mgrid[:32, :32] + 0.5


def area(boxes):
    left, top, right, bottom = np.moveaxis(boxes[..., :4, None, None], -3, 0)
    return (left <= x) & (x < right) & (top <= y) & (y < bottom)


scenes = np.flatnonzero(found.any(-1))[:48]
drawn = np.array([rng.choice(np.flatnonzero(found[scene])) for scene in scenes])
cells = (good & same)[scenes, drawn].argmax(-1)
inputs, targets = test_x[scenes], outputs[scenes, cells]

boxes = test_y[scenes, drawn]
neighbors = area(test_y[scenes]) & (np.arange(16) != drawn[:, None])[..., None, None]
places = {
    "in the true box": area(boxes),
    "or within two pixels of it": area(boxes[:, :4] + [-2, -2, 2, 2]),
    "on another digit": neighbors.any(1),
}


# %% output="markdown"
def print_row(name, shares):
    print(f"| {name} |", " | ".join(f"{share:.0%}" for share in shares), "|")


def report(name, explanations):
    maxima = np.reshape(explanations, (len(scenes), -1)).argmax(1)
    row, column = np.divmod(maxima, 32)
    hits = [place[range(len(scenes)), row, column].mean() for place in places.values()]
    print_row(name, hits)


heading = "| Maximum | " + " | ".join(places) + " |\n| --- | ---: | ---: | ---: |"
print(heading)
print_row("Chance: any pixel", [place.mean() for place in places.values()])
ink = inputs[..., 0] > 0.2
on_ink = [(ink & place).sum() / ink.sum() for place in places.values()]
print_row("Chance: any ink", on_ink)
for name, explainer in explainers.items():
    report(name, explainer(inputs, targets))

# %% [markdown]
# Integrated Gradients, Occlusion and Rise point into the right box nearly always,
# though there are several digits in each scene, and hardly ever at another one.
#
# Saliency misses the box more often than not, but not by much: with the margin it hits.
# A gradient asks what would change the score the fastest. For a box that fits already,
# that is an empty pixel just beside the digit: ink there would move an edge. What the
# detection *rests on* is another question, and the other three methods, which take the
# digit away, answer that one.
#
# ## Grad-CAM, and how to keep the place
#
# Grad-CAM accepts `operator` and ignores it: it explains the sum of output times
# target. So for a detector the target has the shape of the whole output, and is 1 at
# one number. Here that is the probability of the right class in the row of the
# detection.

# %% output="markdown"
from xplique.attributions import GradCAM

numbers = np.zeros((len(scenes), 16, 15), "float32")
numbers[range(len(scenes)), cells, 5 + targets[:, 5:].argmax(-1)] = 1

print(heading)
report("Grad-CAM", GradCAM(wrapped, conv_layer="relu_2")(inputs, numbers))

# %% [markdown]
# It points at another digit more often than at the right one. `relu_2` is the last
# layer with 8 × 8 places. Grad-CAM weighs each
# channel of the layer with the gradient's mean over all places, and which box was asked
# about is lost in that mean. With the product of gradient and activation at each place,
#
# $$\mathrm{ReLU}\Big(\sum_k \frac{\partial s}{\partial A^k_{ij}} A^k_{ij}\Big)
# \quad\text{instead of}\quad
# \mathrm{ReLU}\Big(\sum_k \alpha_k A^k_{ij}\Big), \qquad
# \alpha_k = \frac{1}{HW} \sum_{i,j} \frac{\partial s}{\partial A^k_{ij}},$$
#
# it is kept. Xplique has no such method, but a wrapped model is a Keras functional
# model: it can be cut in two at the layer, and the rest is a few lines of TensorFlow.

# %% output="markdown"
layer = wrapped.get_layer("relu_2")
features = tf.keras.Model(wrapped.inputs, layer.output)
head = tf.keras.Model(layer.output, wrapped.output)

with tf.GradientTape() as tape:
    activations = features([inputs])
    tape.watch(activations)
    score = tf.reduce_sum(head(activations) * numbers)
product = tape.gradient(score, activations) * activations
local = tf.nn.relu(tf.reduce_sum(product, axis=-1, keepdims=True))
local = tf.image.resize(local, (32, 32), method="bicubic")

print(heading)
report("Gradient times activation, place by place", local)

# %% [markdown]
# Where the answer is one for the whole image, Grad-CAM points well: see [Grad-CAM in a
# residual network](residual_network.py). The same scenes, pixel by pixel instead of box
# by box, are the subject of [segmentation](segmentation.py).
