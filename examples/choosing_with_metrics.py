# %% [markdown]
# # Choosing a method with metrics
#
# Eight attribution methods explain held-out scenes of one model, and Xplique's metrics compare
# them: how faithful they are to the model, how simple, how stable. Two maps that never saw the
# model go along, for what they score is what a score is worth: one of them beats some of the
# methods.

# %% [markdown]
# ## The model and its scenes
#
# As in the [gallery](methods_gallery.py): two handwritten digits on a crop of a photograph, and a
# network that says for each of the ten digits whether it is in the scene. The digits and the halves
# of the photographs that it is tested on are not among those that it is trained on.

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
# ## Eight methods, and two maps that never saw the model
#
# The scenes that are explained are held-out ones in which both digits were found. The question is
# about one of the two. The network gives logits, so the probability of a digit is the sigmoid of
# its logit.
#
# The two other maps are a yardstick: a random map, and the brightness of the pixels. The ink is
# white, so brightness shows where the digits are, but nothing about the model.

# %%
import tensorflow as tf
from xplique import attributions as xa

from xplique_flax import FlaxWrapper

wrapped = FlaxWrapper(model, params, input_shape=(48, 48, 3))

chosen = np.flatnonzero(found)[:20]
inputs = test_x[chosen]
targets = np.eye(10, dtype="float32")[test_labels[chosen, 0]]


def random_map(inputs, targets):
    return tf.random.uniform((len(inputs), 48, 48, 1))


def brightness(inputs, targets):
    return tf.reduce_mean(inputs, axis=-1, keepdims=True)


blind = {"Random map": random_map, "Brightness": brightness}
explainers = {
    "Saliency": xa.Saliency(wrapped),
    "Integrated Gradients": xa.IntegratedGradients(wrapped, steps=30, batch_size=240),
    "SmoothGrad": xa.SmoothGrad(wrapped, noise=0.1, nb_samples=30, batch_size=240),
    "Guided Backprop": xa.GuidedBackprop(wrapped),
    "Grad-CAM": xa.GradCAM(wrapped, conv_layer="relu_3"),
    "Occlusion": xa.Occlusion(wrapped, patch_size=6, patch_stride=3, batch_size=240),
    "Rise": xa.Rise(wrapped, nb_samples=480, batch_size=240),
    "Kernel SHAP": xa.KernelShap(wrapped, nb_samples=240, ref_value=np.zeros(3)),
}
everything = blind | explainers

tf.random.set_seed(0)
maps = {name: np.array(everything[name](inputs, targets)) for name in everything}
print(len(maps), "sets of maps of shape", maps["Saliency"].shape)

# %% [markdown]
# ## Is it faithful to the model?
#
# A faithful map gives high values to those pixels on which the model's answer depends. Most metrics
# test that by taking pixels away:
#
# - **Deletion** (lower is better) replaces the pixels with the highest values first, and takes the
#   area under the curve of the probability. If the map is right, the probability falls at once.
# - **Insertion** (higher is better) starts from nothing and puts the pixels with the highest values
#   back first.
# - **MuFidelity** (higher is better) removes random sets $S$ of grid cells, and correlates what the
#   score loses with what the map $\phi$ says of them:
#   $\operatorname{corr}_S\big(f(x) - f(x_{\notin S}),\ \sum_{i \in S} \phi_i\big)$, where
#   $\operatorname{corr}$ is Spearman's.
# - **Average Drop** (lower is better) multiplies the scene by the map's absolute values, scaled to
#   $[0, 1]$, and takes the share of the probability that is lost; **Average Increase** (higher is
#   better) counts how often it rises, and **Average Gain** (higher is better) how much of the way
#   to 1 it rises.
#
# `activation="sigmoid"` makes them look at probabilities; MuFidelity looks at the logits here,
# since ranks need no probabilities. `steps` is the number of steps in which Deletion and Insertion
# replace all pixels.

# %%
from xplique import metrics as xm

data = (wrapped, inputs, targets)
fidelity = {
    "Deletion ↓": xm.Deletion(*data, activation="sigmoid", steps=12),
    "Insertion ↑": xm.Insertion(*data, activation="sigmoid", steps=12),
    "MuFidelity ↑": xm.MuFidelity(*data, grid_size=8, nb_samples=80, batch_size=240),
    "Avg. Drop ↓": xm.AverageDropMetric(*data, activation="sigmoid"),
    "Avg. Increase ↑": xm.AverageIncreaseMetric(*data, activation="sigmoid"),
    "Avg. Gain ↑": xm.AverageGainMetric(*data, activation="sigmoid"),
}

# %% [markdown]
# The metrics are called with the maps. The best method in each column is bold; the two maps that
# never saw the model are not in the running.

# %% output="markdown"
scores = {}
for title, metric in fidelity.items():
    scores[title] = {name: metric(explanations) for name, explanations in maps.items()}


def print_table(titles):
    print("| Method |", " | ".join(titles), "|")
    print("| :-- |" + " --: |" * len(titles))
    for name in maps:
        cells = []
        for title in titles:
            values = [scores[title][method] for method in explainers]
            best = {"↓": min(values), "↑": max(values)}.get(title[-1])
            cell = f"{scores[title][name]:.3f}"
            cells.append(f"**{cell}**" if scores[title][name] == best else cell)
        print(f"| {name} |", " | ".join(cells), "|")


print_table(fidelity)

# %% [markdown]
# Deletion and Insertion are areas under curves, and the curves say more. `detailed_evaluate` gives
# them.

# %% alt="Two plots of the mean probability against the share of pixels changed. Left, Deletion: the curves of Integrated Gradients and Occlusion fall to nearly 0 within the first sixth, those of Saliency and Brightness stay higher, that of the random map falls slowly; all end at about one half. Right, Insertion: Occlusion rises to 1 at once, and the random map last."
import matplotlib.pyplot as plt

styles = {
    "Random map": {"color": "gray", "linestyle": ":"},
    "Brightness": {"color": "gray", "linestyle": "--"},
    "Saliency": {"color": "tab:blue"},
    "Integrated Gradients": {"color": "tab:orange"},
    "Occlusion": {"color": "tab:purple"},
}
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
for axes, title in (left, "Deletion ↓"), (right, "Insertion ↑"):
    for name, style in styles.items():
        curve = fidelity[title].detailed_evaluate(maps[name])
        share = np.array(list(curve)) / (48 * 48)
        axes.plot(share, list(curve.values()), label=name, **style)
    axes.set_title(title)
    axes.set_xlabel("share of pixels changed")
left.set_ylabel("mean probability")
right.legend(fontsize=8)

plt.show()

# %% [markdown]
# A scene of which all pixels are replaced is black, and there the model does not say 0. In
# training it always had two digits to find, and never an empty scene. Taking pixels away shows a
# model what it was not made for; what it says then counts in these scores too.

# %% [markdown]
# ### Better than chance, and better than brightness?
#
# Every score needs something to be compared with. A random map does not score 0 or 1, and it
# differs from draw to draw:

# %%
draws = [random_map(inputs, targets).numpy() for _ in range(5)]
for title in ["Deletion ↓", "Insertion ↑", "MuFidelity ↑"]:
    metric = fidelity[title]
    values = [metric(draw) for draw in draws]
    print(f"{title}  random maps: {min(values):.3f} to {max(values):.3f}")

# %% [markdown]
# The one in the table was another draw. All methods have a better Deletion and Insertion than
# random maps, which is the least to ask for. Brightness is the harder yardstick. The ink is most of
# what the model looks at, and the brightest pixels are ink, so a map that knows nothing of the
# model scores better than several methods in Insertion and in the three averages. In Deletion all
# methods are ahead of it. That a score is far from a random map's does not yet show that the method
# explains *this model*.
#
# Average Drop and its siblings keep the pixels in proportion to the map. That suits maps that cover
# the whole digit. Scattered dots, as of Saliency, or one small spot, as of Grad-CAM, leave a scene
# that the model has never seen the like of.
#
# MuFidelity of a random map is above 0, and that of Rise hardly higher. Both have the same cause:
# the random sets differ in size. A larger set costs more of the score, and any map of positive
# values has a larger sum there, whatever it shows. Rise gives mean scores, which carry such a
# constant. Without the mean of each map, the two part. MuFidelity draws new sets at each call,
# hence the differences from the table:

# %%
for name in ["Random map", "Rise"]:
    explanations = maps[name]
    centered = explanations - explanations.mean(axis=(1, 2, 3), keepdims=True)
    before, after = map(fidelity["MuFidelity ↑"], [explanations, centered])
    print(f"{name}: {before:.3f}, centered {after:.3f}")

# %% [markdown]
# ## Is it simple, and is it stable?
#
# - **Complexity** is the entropy of the map's absolute values, **Sparseness** their Gini index: a
#   map that is concentrated on few pixels has a low complexity and a sparseness close to 1.
#   Neither looks at the model. A single arbitrary pixel would be the simplest map, so these are
#   no scores to maximize: they decide between maps that are equally faithful.
# - **Average Stability** (lower is better) explains slightly noisy copies of each scene, and
#   takes the mean distance between the maps. It is called with the explainer, not with its maps.
#
# !!! warning "Give Average Stability a distance without a unit"
#     Its default is the Euclidean distance of the maps. It grows with their scale, and the maps of
#     two methods have different scales. One minus the correlation compares them.


# %% output="markdown"
def distance(noisy, original):
    return 1 - np.corrcoef(np.ravel(noisy), np.ravel(original))[0, 1]


tf.get_logger().setLevel("ERROR")  # hides notes about functions that are compiled anew

few = (wrapped, inputs[:4], targets[:4])
stability = xm.AverageStability(*few, radius=0.1, distance=distance, nb_samples=4)
complexity, sparseness = xm.Complexity(), xm.Sparseness()
scores["Complexity"] = {name: complexity(maps[name]) for name in maps}
scores["Sparseness"] = {name: sparseness(maps[name]) for name in maps}
scores["Instability ↓"] = {name: stability(everything[name]) for name in maps}

print_table(["Complexity", "Sparseness", "Instability ↓"])

# %% [markdown]
# Brightness is stable as well: a map that ignores the model has nothing to be unstable with. Rise
# and Kernel SHAP draw new masks at each call, and a part of their instability is that. A larger
# `nb_samples` of theirs lowers it.

# %% [markdown]
# ## What does "removed" mean?
#
# All of the above replaces pixels by black, the default. Whether a pixel is *removed* when it is
# black depends on the data, and the score depends on it too. The same Deletion again, with three
# baselines: black, the mean color of the scene, and white, the color of the ink.


# %% output="markdown"
def mean_color(inputs):
    return np.broadcast_to(inputs.mean(axis=(1, 2), keepdims=True), inputs.shape)


baselines = {"mean color": mean_color, "white": 1.0}
scores["black ↓"] = scores["Deletion ↓"]
for name, baseline in baselines.items():
    options = {"activation": "sigmoid", "steps": 12, "baseline_mode": baseline}
    deletion = xm.Deletion(*data, **options)
    scores[f"{name} ↓"] = {method: deletion(maps[method]) for method in maps}

print_table(["black ↓", "mean color ↓", "white ↓"])

# %% [markdown]
# !!! warning "A ranking holds for one baseline"
#     With white, Integrated Gradients, SmoothGrad, Guided Backprop and Kernel SHAP fall behind the
#     random map. They put the ink first, and ink that turns white is still ink. Maps that also
#     cover the surroundings of the digit make it vanish. Choose a baseline that means "nothing" for
#     your data, say which, and see whether another one gives the same order.
#
# The methods have a baseline too. Integrated Gradients, Occlusion, Rise and Kernel SHAP were all
# made with black here, and to be judged with black may favor them.

# %% [markdown]
# ## Do the metrics agree with the truth?
#
# Here the place of the digit is known, which real data seldom offer. The share of each map's 5 %
# highest pixels that lie in the digit's box is another measure, which does not change the scene
# at all. How well does each metric put the eight methods in that order?

# %% output="markdown"
from scipy.stats import spearmanr


def on_digit(pictures):
    shares = []
    for picture, (y, x) in zip(pictures, corners[chosen, 0]):
        box = np.zeros((48, 48), bool)
        box[y : y + 16, x : x + 16] = True
        shares.append(box.flat[np.argsort(picture, axis=None)[-115:]].mean())
    return np.mean(shares)


scores["On the digit ↑"] = {name: on_digit(maps[name]) for name in maps}
print_table(["On the digit ↑"])

truth = [scores["On the digit ↑"][name] for name in explainers]
print("\n| Metric | Rank correlation with it |\n| :-- | --: |")
for title in [*fidelity, "mean color ↓", "white ↓"]:
    values = [scores[title][name] for name in explainers]
    sign = -1 if title[-1] == "↓" else 1
    label = title if title in fidelity else f"Deletion, {title}"
    print(f"| {label} | {sign * spearmanr(values, truth)[0]:.2f} |")

# %% [markdown]
# Eight methods are few for a correlation, so read signs and not digits. Still, the columns differ
# in what they reward. Deletion with black is the strictest about single pixels: it favors the
# dotted maps of Integrated Gradients and SmoothGrad, which find the pixels that hurt most, and
# they are not the ones that lie on the digit most. Insertion and the averages favor maps that
# keep the digit whole. Neither is wrong: they ask different questions. Nor is the box the truth
# about the model, which may well look at the digit's surroundings.

# %% [markdown]
# ## Choosing
#
# - Decide first what the map is for. Which pixels would change the answer? Deletion. Which part
#   of the scene is enough for it? Insertion and Average Gain. A map to add up over regions?
#   MuFidelity.
# - Compare on held-out inputs, with yardsticks that never saw the model, and with more than one
#   baseline.
# - Among methods that are equally faithful, take the stabler and the simpler one.
# - Check that the explanations change when the model does:
#   [Sanity checks by randomizing the model](sanity_checks.py). No metric on this page does that.
#
# For this model, Occlusion is the best or close to it by most measures. It is coarse, calls the
# model once per patch, and was given the baseline that it is judged with.
#
# Of Xplique's 12 metrics three are not here: Model Randomization and Random Logit are in the
# sanity checks, and MeGe, which trains several models, is in the
# [FAQ](../faq.md#does-it-work-for-all-metrics).

# %% [markdown]
# ## Sources
#
# - **Deletion** and **Insertion**: Petsiuk, Das and Saenko (2018), *RISE: Randomized Input
#   Sampling for Explanation of Black-box Models*
# - **MuFidelity**, **Average Stability** and **Complexity**: Bhatt, Weller and Moura (2020),
#   *Evaluating and Aggregating Feature-based Model Explanations*
# - **Average Drop** and **Average Increase**: Chattopadhay, Sarkar, Howlader and Balasubramanian
#   (2018), *Grad-CAM++: Generalized Gradient-based Visual Explanations for Deep Convolutional
#   Networks*
# - **Average Gain**: Zhang, Torres, Sicre, Avrithis and Ayache (2024), *Opti-CAM: Optimizing
#   saliency maps for interpretability*
# - **Sparseness**: Chalasani, Chen, Chowdhury, Wu and Jha (2020), *Concise Explanations of Neural
#   Networks using Adversarial Training*
# - On baselines: Sturmfels, Lundberg and Lee (2020), *Visualizing the Impact of Feature Attribution
#   Baselines*
#
# The methods' own papers are listed in the [gallery](methods_gallery.py#sources).
