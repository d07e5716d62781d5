# %% [markdown]
# # FORGrad: removing the noise of gradients
#
# Maps made of gradients look noisy, and part of the noise comes from the architecture: strides and
# poolings leave high frequencies in the gradient. [FORGrad](https://arxiv.org/abs/2307.09591) removes
# the frequencies above a cutoff, which is chosen once per model and method, on validation data.
#
# Here it turns the dotted maps of Saliency and Guided Backprop into a spot. On test data, that spot
# lies on the digit asked about more often than the dots did, and by Deletion and Insertion the maps
# are more faithful. The last table also shows what it costs, and a method that it does not suit.

# %% [markdown]
# ## The model and its scenes
#
# Each scene is a crop of a photograph, darkened, with three different handwritten digits in three of
# its quarters. The network says for each of the ten digits whether it is in the scene. It halves the
# resolution twice, by strides, and takes the maximum over all places at its end.
#
# Digits and photographs are split three ways: to train the network, to choose the cutoff, and to test
# it.

# %%
import jax
import numpy as np
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

images, digits = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8)
ink = np.array(jax.image.resize(images, (len(images), 16, 16), "linear"))
ids = np.arange(len(digits))
train_ids, held_out = train_test_split(ids, test_size=0.4, random_state=0)
val_ids, test_ids = train_test_split(held_out, test_size=0.5, random_state=0)

photos = [photo[::2, ::2] / 255 * 0.4 for photo in load_sample_images().images]
train_photos = [photo[:, :160] for photo in photos]
val_photos = [photo[:, 160:240] for photo in photos]
test_photos = [photo[:, 240:] for photo in photos]


def compose(number, ids, photos, rng):
    """Write three different digits on each of a number of crops."""
    scenes = np.empty((number, 48, 48, 3), "float32")
    labels = np.empty((number, 3), int)
    corners = np.empty((number, 3, 2), int)
    quarters = np.array([[0, 0], [0, 24], [24, 0], [24, 24]])
    for i, scene in enumerate(scenes):
        photo = photos[rng.integers(2)]
        y, x = rng.integers(0, np.subtract(photo.shape[:2], 48))
        scene[:] = photo[y : y + 48, x : x + 48]
        labels[i] = rng.choice(10, 3, replace=False)
        corners[i] = rng.permutation(quarters)[:3] + rng.integers(0, 9, (3, 2))
        for label, (y, x) in zip(labels[i], corners[i]):
            strokes = ink[rng.choice(ids[digits[ids] == label])]
            place = scene[y : y + 16, x : x + 16]
            place += (1 - place) * strokes[..., None]
    return scenes, labels, corners


# %%
import flax.linen as nn
import optax


class SceneNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (5, 5), strides=(2, 2))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.relu(nn.Conv(48, (3, 3))(x))
        return nn.Dense(10)(x.max(axis=(1, 2)))


rng = np.random.default_rng(0)
x, labels, _ = compose(32, train_ids, train_photos, rng)
model = SceneNet()
params = jax.jit(model.init)(jax.random.key(0), x)
steps = 400
optimizer = optax.adam(optax.cosine_decay_schedule(6e-3, steps))
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

# %% [markdown]
# Explained are 64 scenes of each held-out set in which all three digits were found. The question is
# about one of the three, which may be in any quarter.

# %%
predict = jax.jit(model.apply)


def to_explain(name, ids, photos):
    scenes, labels, corners = compose(120, ids, photos, rng)
    top_three = np.argsort(predict(params, scenes))[:, -3:]
    found = (np.sort(top_three) == np.sort(labels)).all(axis=1)
    print(f"{name}: all digits found in {found.mean():.0%} of {len(found)} scenes")
    chosen = np.flatnonzero(found)[:64]
    targets = np.eye(10, dtype="float32")[labels[chosen, 0]]
    return scenes[chosen], targets, corners[chosen, 0]


val_x, val_targets, _ = to_explain("Validation", val_ids, val_photos)
test_x, test_targets, test_corners = to_explain("Test", test_ids, test_photos)

# %% [markdown]
# ## Noise at the frequency of a stride
#
# Saliency is the absolute gradient. Guided Backprop is a gradient too, in which the ReLUs pass back
# only what is positive. Occlusion does not differentiate the network, and serves as a comparison.
#
# The Fourier transform says how much of a map varies at which frequency. On 48 pixels the lowest
# frequency is one cycle per image. The highest one along an axis is 24 cycles, where every other
# pixel differs: that is the pattern which a stride of 2 leaves.

# %%
import tensorflow as tf
from xplique import attributions as xa

from xplique_flax import FlaxWrapper

wrapped = FlaxWrapper(model, params, input_shape=(48, 48, 3))
tf.get_logger().setLevel("ERROR")  # hides notes about functions that are compiled anew
to_filter = {
    "Saliency": xa.Saliency(wrapped),
    "Guided Backprop": xa.GuidedBackprop(wrapped),
}
others = {
    "Integrated Gradients": xa.IntegratedGradients(wrapped, steps=10, batch_size=640),
    "Occlusion": xa.Occlusion(wrapped, patch_size=8, patch_stride=4, batch_size=121),
}


def explain(explainers, inputs, targets):
    return {name: each(inputs, targets) for name, each in explainers.items()}


val_maps = explain(to_filter, val_x, val_targets)
test_maps = explain(to_filter | others, test_x, test_targets)

# %% alt="A line plot on a logarithmic axis: the mean power of three kinds of maps against the frequency. All fall steeply up to 4 cycles. Saliency and Guided Backprop then fall slowly, and rise again from 20 to 24 cycles. Occlusion goes up and down below them."
import matplotlib.pyplot as plt

rows, columns = np.mgrid[-24:24, -24:24]
frequency = np.hypot(rows, columns)
figure, axes = plt.subplots(figsize=(7, 2.6))
for name in ["Saliency", "Guided Backprop", "Occlusion"]:
    pictures = np.abs(np.reshape(test_maps[name], (64, 48, 48)))
    spectrum = np.fft.fftshift(np.fft.fft2(pictures), axes=(1, 2))
    power = (np.abs(spectrum) ** 2).mean(axis=0)
    ring = [power[np.rint(frequency) == radius].mean() for radius in range(1, 25)]
    axes.semilogy(range(1, 25), ring / ring[0], label=name)
    high = power[frequency > 12].sum() / power[frequency > 0].sum()
    print(f"{name}: {high:.0%} of the power is above 12 cycles per image")
axes.set(xlabel="cycles per image", ylabel="mean power")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# The power of the gradients does not fall to the end: it rises again towards 24 cycles. That of
# Occlusion is lower almost everywhere above 4 cycles; its zeros are those of its square patches.

# %% [markdown]
# ## What `forgrad` does
#
# `forgrad(maps, sigma)` takes the absolute values of the maps, and keeps the frequencies of up to
# `sigma` cycles per image. A small `sigma` removes most. With 34, more than half the diagonal of the
# spectrum, nothing is removed.

# %% alt="A scene with a 7, a 4 and a 0, and five maps that ask for the 4, with a lower and lower cutoff: dots on a grid, blurred patches, a spot on the 4 for sigma 3 and 1.5, and a larger spot with a band above it for sigma 1."
from xplique.commons import forgrad

raw = test_maps["Saliency"]
print("Saliency:", raw.shape, "filtered:", forgrad(raw, sigma=3).shape)

figure, row = plt.subplots(1, 6, figsize=(7.2, 1.5), layout="constrained")
row[0].imshow(test_x[2])
row[0].set_title("scene", fontsize=9)
for axes, sigma in zip(row[1:], [34, 6, 3, 1.5, 1]):
    axes.imshow(forgrad(raw, sigma)[2])
    axes.set_title(f"sigma={sigma}", fontsize=9)
for axes in row:
    axes.axis("off")
plt.show()

# %% [markdown]
# With less and less of the spectrum the grid goes first, then the dots, and the place remains: a spot
# on the 4 that was asked about. With 1 there is only one wave left along each axis, and the spot
# spreads.
#
# !!! warning "What to know about `forgrad`"
#     - **The sign is lost.** Channels are averaged, then absolute values are taken. A map with a sign
#       says which pixels speak against the target; the filtered one does not.
#     - **The default is `sigma=15`**, the paper's for 224 pixels. A cutoff is counted in cycles per
#       image, so a smaller image needs a smaller one, and one below 15 pixels an explicit one. It
#       need not be an integer.
#     - **A map goes on at its opposite edge**, as for any Fourier filter: what is at one edge spreads
#       to the other.
#     - **The maps have to be square, and of even size.** Others than square are refused. For an odd
#       size Xplique 2.0.2 puts the filter in the wrong place, and with a low cutoff even the mean is
#       lost, as below. Cut off a row and a column, or pad the maps.
#     - **The result has no axis of channels.** The metrics and plots accept that.

# %%
for size in [48, 47]:
    constant = np.ones((1, size, size, 1), "float32")
    print(f"{size} pixels, all 1: mean {np.mean(forgrad(constant, 1)):.2f} after the filter")

# %% [markdown]
# ## Choose the cutoff on validation data
#
# As in the paper, the cutoff is the one with the most faithful maps on a validation set. Deletion
# replaces the pixels with the highest values by black, and the probability should fall; Insertion
# starts from black and puts them back, and it should rise. The higher Insertion minus Deletion, the
# better. `max_percentage_perturbed=0.4` follows them over the first 40 % of the pixels, those that
# the map says matter.

# %% alt="A line plot of Insertion minus Deletion against sigma. The lines of Saliency and Guided Backprop both have their maximum at 1.5, well above the dotted lines of the maps that are not filtered, and fall towards them from 2 to 10."
from xplique import metrics as xm


def fidelity(inputs, targets):
    data = (wrapped, inputs, targets, 256)
    options = {
        "activation": "sigmoid",
        "steps": 8,
        "max_percentage_perturbed": 0.4,
    }
    return xm.Deletion(*data, **options), xm.Insertion(*data, **options)


deletion, insertion = fidelity(val_x, val_targets)
sigmas = [1, 1.5, 2, 3, 5, 10, 34]
best = {}
figure, axes = plt.subplots(figsize=(7, 2.6))
for name, maps in val_maps.items():
    curve = []
    for sigma in sigmas:
        filtered = forgrad(maps, sigma)
        curve.append(insertion(filtered) - deletion(filtered))
    best[name] = sigmas[np.argmax(curve)]
    before = insertion(maps) - deletion(maps)
    print(f"{name}: {before:.2f} before, {max(curve):.2f} with sigma={best[name]}")
    (line,) = axes.plot(sigmas, curve, "o-", label=name)
    label = f"{name}, not filtered"
    axes.axhline(before, color=line.get_color(), linestyle=":", label=label)
axes.set(xscale="log", xlabel="sigma", ylabel="Insertion − Deletion")
axes.set_xticks(sigmas, sigmas)
axes.minorticks_off()
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# Both methods gain most with the same low cutoff. It keeps what is about as large as a digit, and
# nothing finer. From 10 on the filter does little. Guided Backprop stays above its dotted line even
# with 34, where nothing is removed, because `forgrad` takes the absolute values.

# %% [markdown]
# ## Before and after, on test data
#
# The cutoffs are now fixed, and the scenes are others. Two more columns use neither Deletion nor
# Insertion:
#
# - **MuFidelity**, the rank correlation between the values of random sets of cells and what the score
#   loses without them;
# - **On the digit**, the share of the 5 % of pixels with the highest values that lie in the box of the
#   digit asked about. A box is 11 % of the scene.
#
# And there are more rows: Occlusion, a random map, which shows what smoothing alone does to the
# scores, and Integrated Gradients, a map with a sign.

# %% output="markdown"
tf.random.set_seed(0)
random_maps = tf.random.uniform((64, 48, 48))
saliency, guided, integrated, occlusion = (
    test_maps[name] for name in ["Saliency", "Guided Backprop", "Integrated Gradients", "Occlusion"]
)
sigma = best["Saliency"]
maps = {
    "Saliency": saliency,
    "Saliency, filtered": forgrad(saliency, sigma),
    "Guided Backprop": guided,
    "Guided Backprop, filtered": forgrad(guided, best["Guided Backprop"]),
    "Occlusion": occlusion,
    "Random map": random_maps,
    "Random map, filtered": forgrad(random_maps, sigma),
    "Integrated Gradients": integrated,
    "Integrated Gradients, absolute": tf.abs(integrated),
    "Integrated Gradients, filtered": forgrad(integrated, sigma),
}


def on_digit(maps):
    shares = []
    for picture, (y, x) in zip(np.reshape(maps, (64, 48, 48)), test_corners):
        box = np.zeros((48, 48), bool)
        box[y : y + 16, x : x + 16] = True
        shares.append(box.flat[np.argsort(picture, axis=None)[-115:]].mean())
    return np.mean(shares)


deletion, insertion = fidelity(test_x, test_targets)
mufidelity = xm.MuFidelity(wrapped, test_x, test_targets, 256, grid_size=8, nb_samples=20)
print("| Map | Deletion ↓ | Insertion ↑ | Difference ↑ | MuFidelity ↑ | On the digit ↑ |")
print("| :-- | --: | --: | --: | --: | --: |")
for name, pictures in maps.items():
    tf.random.set_seed(0)  # the same random sets for MuFidelity
    low, high = deletion(pictures), insertion(pictures)
    values = [low, high, high - low, mufidelity(pictures), on_digit(pictures)]
    print(f"| {name} |", " | ".join(f"{value:.2f}" for value in values), "|")

# %% [markdown]
# Filtered, the maps of both methods have a better Deletion and a better difference, on scenes and
# digits that neither the network nor the cutoff was fitted to. Insertion hardly changes for Saliency,
# and falls a little for Guided Backprop. Nearly all of the highest values now lie on the digit, as with
# Occlusion, which calls the network 121 times per scene. By Deletion and Insertion, Occlusion stays
# ahead.
#
# Three cautions:
#
# - **Smoothing alone changes Deletion.** The random map's falls as well when it is filtered, by about
#   as much: a black region disturbs the network more than black dots do. But a filtered random map
#   is not on the digit, and its Insertion does not rise. So do not judge a filter by Deletion alone.
# - **MuFidelity disagrees.** It falls for all maps but the random one. A spot says where the digit is
#   and no more; the sums over small cells, which MuFidelity compares, were better before.
# - **A map with a sign may lose by it.** The raw map of Integrated Gradients has the best Deletion: its
#   sign tells what speaks for the digit from what speaks against it. `forgrad` begins with the absolute
#   values. They cost more than the filter brings back, though the spot is on the digit.

# %% [markdown]
# ## What it looks like

# %% alt="Four columns, each with a scene of three digits, its Saliency map, the filtered one, its Guided Backprop map and the filtered one; a box marks the digit asked about. Saliency has dots in and around the box, and on the other digits. Guided Backprop draws the strokes in the box. The filtered maps have one spot each, in the box."
figure, grid = plt.subplots(5, 4, figsize=(4, 4.8), layout="constrained")
shown = {"scene": test_x} | dict(list(maps.items())[:4])
for row, (name, pictures) in zip(grid, shown.items()):
    row[0].set_ylabel(name.replace(", ", "\n").replace(" B", "\nB"), fontsize=8)
    for axes, picture, (y, x) in zip(row, pictures, test_corners):
        if name == "Guided Backprop":
            limit = np.abs(picture).max()
            axes.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit)
        else:
            axes.imshow(picture)
        axes.set(xticks=[], yticks=[])
        corner = (x - 0.5, y - 0.5)
        axes.add_patch(plt.Rectangle(corner, 16, 16, fill=False, edgecolor="cyan"))
plt.show()

# %% [markdown]
# What the eye gains is a place, and what it loses is a shape: the strokes that Guided Backprop draws
# are gone. The first scene also shows the opposite edge: the spot at the lower edge goes on at the
# upper one.
#
# Whether a map becomes one spot depends on the cutoff, and the cutoff on the data: here on the size of
# the digits. For another model or another method look for another one, as the paper does. Whether a
# map depends on what the model has learned is a different question, which [sanity
# checks](sanity_checks.py) ask: a map that fails them does not pass because it is smooth.

# %% [markdown]
# ## Sources
#
# - **FORGrad**: Muzellec, Fel, Boutin, Andéol, VanRullen and Serre (2024), [*Saliency Strikes Back: How
#   Filtering out High Frequencies Improves White-Box Explanations*](https://arxiv.org/abs/2307.09591)
#
# The papers of the methods are listed in the [gallery](methods_gallery.py#sources), those of the
# metrics in [Choosing a method with metrics](choosing_with_metrics.py#sources).
