# %% [markdown]
# # Explaining by examples
#
# The answer is not a map here, but training digits: those that a network finds most like the one
# it reads, those for which it would change its mind, and those that stand for all. You will have
# used all nine methods of Xplique's `example_based` with a Flax NNX network, and measured what
# each meaning of "similar" is good for.
#
# The result: of the training digits that are nearest to a misread one, 57% are of the class that
# it was taken for, in a hidden layer of the network; by pixels they are 38%. And ten training
# digits, one of each class, are enough to read 95.2% of held-out digits rightly, where the network
# reads 97.8%.

# %% [markdown]
# ## The network
#
# A small NNX network learns scikit-learn's handwritten digits. Half of them are training digits.
# They are also the *cases*, among which all examples will be found.

# %%
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

images, digits = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
split = train_test_split(images, digits, train_size=896, random_state=0)
train_x, test_x, train_y, test_y = split


class Block(nnx.Module):
    def __init__(self, channels_in, channels_out, rngs):
        self.conv = nnx.Conv(channels_in, channels_out, (3, 3), rngs=rngs)

    def __call__(self, x):
        return nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), strides=(2, 2))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(1, 16, rngs), Block(16, 32, rngs)])
        self.hidden = nnx.Linear(2 * 2 * 32, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.hidden(x.reshape(len(x), -1)))
        return self.head(x)


network = Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(network, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def step(network, optimizer, x, y):
    def loss(network):
        losses = optax.softmax_cross_entropy_with_integer_labels(network(x), y)
        return losses.mean()

    optimizer.update(network, nnx.grad(loss)(network))


rng = np.random.default_rng(0)
for _ in range(300):
    batch = rng.choice(len(train_x), 64)
    step(network, optimizer, train_x[batch], train_y[batch])

# %% [markdown]
# An NNX module holds its parameters, so it is wrapped alone. The layers have the paths of its
# attributes as names.

# %%
from xplique_flax import FlaxWrapper

wrapped = FlaxWrapper(network, input_shape=(8, 8, 1))
for layer in wrapped.list_layers():
    print(f"{layer.name:15} {layer.shape}")

# %% [markdown]
# Examples explain what the network *reads*, right or wrong. So its own answers are what counts
# from here on, for the training digits too:

# %%
logits, train_logits = np.array(wrapped(test_x)), np.array(wrapped(train_x))
read, train_read = logits.argmax(-1), train_logits.argmax(-1)
right, wrong = np.flatnonzero(read == test_y), np.flatnonzero(read != test_y)

print(f"Accuracy on {len(test_x)} held-out digits: {(read == test_y).mean():.1%}")
print("Held-out digits misread:", len(wrong))
print("Training digits misread:", (train_read != train_y).sum())

# %% [markdown]
# ## The most similar training digits
#
# `SimilarExamples` finds the cases that are nearest to an input. In which space, is up to a
# *projection*. The usual one is the latent space of a layer, here the last hidden one: 64 numbers
# after a ReLU. `split` cuts the network there.
#
# Xplique returns examples together with their labels. The labels given here are the numbers of the
# training digits, so that all that is known of an example can be looked up.

# %%
import warnings

import tensorflow as tf
from xplique.example_based import SimilarExamples
from xplique.example_based.projections import LatentSpaceProjection

warnings.filterwarnings("ignore", module="xplique")  # reminders, which are told below
tf.get_logger().setLevel("ERROR")  # hides notes about functions that are compiled anew

features, head = wrapped.split("relu")
hidden = LatentSpaceProjection(features, latent_layer=None, mappable=False)

one_hot = np.eye(10, dtype="float32")
cases = {
    "cases_dataset": train_x,
    "labels_dataset": np.arange(len(train_x)),
    "targets_dataset": one_hot[train_read],
    "batch_size": len(train_x),  # all at once, for they are few
}

# %% [markdown]
# !!! tip "Project the cases once"
#     With `mappable=False` the cases are projected once, when the method is made. By default this
#     projection is a step of a `tf.data` pipeline: the network then runs on all cases again at
#     each search.
#
# Here are the three mistakes that the network is surest of, drawn with Xplique's `plot_examples`.
# It wants each input in front of its examples, which `include_inputs` does. It also changes
# Matplotlib's defaults for figures to come, which `rc_context` undoes.

# %% alt="Three rows of four pictures: a held-out digit that was misread, and its three most similar training digits. A 5 whose upper half is filled has three nines beside it, a 5 with a small bow has three fours, and an 8 that is a stroke with a faint hole has three ones."
import jax
import matplotlib.pyplot as plt
from xplique.plots import plot_examples


def enlarge(pictures):
    """Make smooth pictures of digits of 8 x 8 pixels."""
    shape = (*pictures.shape[:-3], 24, 24, 1)
    return np.clip(jax.image.resize(pictures, shape, "cubic"), 0, 1).round(1)


two_best = np.sort(logits)[:, -2:]
surest = wrong[np.argsort(np.diff(two_best)[wrong, 0])[::-1][:3]]

returned = ["examples", "labels", "distances", "include_inputs"]
similar = SimilarExamples(**cases, projection=hidden, k=3, case_returns=returned)
found = similar(test_x[surest], one_hot[read[surest]])
numbers = found["labels"].numpy()

with plt.rc_context({"axes.titlesize": 9}):
    plot_examples(
        enlarge(found["examples"].numpy()),
        distances=found["distances"].numpy(),
        labels=train_y[numbers],
        test_labels=test_y[surest],
        predicted_labels=np.column_stack([read[surest], train_read[numbers]]),
        img_size=1.3,
    )
    plt.show()

# %% [markdown]
# The network takes the first for a 9 because it has seen nines that were written like it. The
# second resembles the fours on its right, and the third the ones.

# %% [markdown]
# ## Five meanings of similar
#
# A projection can also weigh what it compares. `AttributionProjection` multiplies pixels or
# activations by an explanation, and `HadamardProjection` by the gradient. Both ask about the output
# times the target, unless they get an `operator`. Any function is a projection too; the plain
# pixels show what is due to the data alone.
#
# | Projection | What is compared |
# | :-- | :-- |
# | pixels | the pictures, without the network |
# | feature maps | the output of the second block |
# | hidden layer | the last 64 activations |
# | pixels × Saliency | the pixels, each times the size of its gradient |
# | hidden × gradient | the 64 activations, each times its gradient: what it adds to the logit |

# %%
from xplique.example_based import projections as xp


def pixels(inputs):
    return tf.reshape(inputs, (-1, 64))


projections = {
    "pixels": pixels,
    "feature maps": xp.LatentSpaceProjection(
        wrapped.truncate("blocks.1"), latent_layer=None, mappable=False
    ),
    "hidden layer": hidden,
    "pixels × Saliency": xp.AttributionProjection(wrapped),
    "hidden × gradient": xp.HadamardProjection(
        features_extractor=features, predictor=head, mappable=False
    ),
}

# %% [markdown]
# !!! note "Cut the model yourself"
#     With `latent_layer="relu"` Xplique cuts the model itself, by calling the layers after it one
#     by one. That is right for a plain chain of layers only.
#     [`split`](../guide/use.md#split-features-and-head) and
#     [`truncate`](../guide/use.md#truncate-explain-a-layer) cut any model at a layer that everything
#     goes through. Without a `latent_layer`, Xplique takes the last layer: here the logits.
#
# The measure: which share of the three nearest cases has the class that the network reads? It is
# taken over 80 held-out digits that are read rightly, and over all 20 that are misread. A case, too,
# counts as what it is read as.

# %% output="markdown"
asked = np.concatenate([right[:80], wrong])
inputs, targets = test_x[asked], one_hot[read[asked]]
misread = read[asked] != test_y[asked]


def share(numbers, classes):
    return (train_read[numbers] == classes[:, None]).mean()


print("| Nearest by | Read rightly: class read | Misread: class read | true class |")
print("| :-- | --: | --: | --: |")
neighbors = {}
for name, projection in projections.items():
    options = {"projection": projection, "k": 3, "case_returns": "labels"}
    similar = SimilarExamples(**cases, **options)
    neighbors[name] = numbers = similar(inputs, targets)["labels"].numpy()
    shares = [
        share(numbers[~misread], read[asked][~misread]),
        share(numbers[misread], read[wrong]),
        share(numbers[misread], test_y[wrong]),
    ]
    print(f"| {name} |", " | ".join(f"{value:.0%}" for value in shares), "|")

# %% [markdown]
# In the first three rows nothing but the depth changes. The deeper the layer, the more neighbors
# of a misread digit belong to the class that the network reads, and the fewer to the true one. So
# the examples tell about the network, not only about the data.
#
# Here is the first of the misread digits, a 5 that was read as a 9:


# %% alt="Five rows of four pictures: a 5 that was read as a 9, and its three nearest training digits in each of five projections. By pixels they are three fives, by feature maps a 9, a 5 and a 5 read as 9, by the hidden layer two nines and a 5. In the last two rows all are nines."
def caption(number):
    """Give the label of a training digit, and what it is read as if that differs."""
    label, answer = train_y[number], train_read[number]
    return f"{label}" if label == answer else f"{label} as {answer}"


figure, rows = plt.subplots(5, 4, figsize=(4.6, 6.2), layout="constrained")
for row, (name, numbers) in zip(rows, neighbors.items()):
    row[0].imshow(enlarge(test_x[wrong[0]]), cmap="gray")
    row[0].set_ylabel(name.replace(" × ", "\n× "), fontsize=9)
    for axes, number in zip(row[1:], numbers[misread][0]):
        axes.imshow(enlarge(train_x[number]), cmap="gray")
        axes.set_title(caption(number), fontsize=9)
rows[0, 0].set_title("input", fontsize=9)
for axes in rows.flat:
    axes.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The number over each neighbor is its label; a "5 as 9" is misread itself. By pixels all three are
# fives, as this one is; in the hidden layer two are nines.
#
# That the last two rows show nines only is partly built in. Each case is weighed for what *it* is
# read as, and the input for the class that you ask about. Cases of other classes have other
# weights, and so lie far away. Ask about the true class, and the neighbors follow:

# %%
as_true = similar(test_x[wrong], one_hot[test_y[wrong]])["labels"].numpy()
of_true_class = share(as_true, test_y[wrong])
print(f"Neighbors of the true class, when asked about it: {of_true_class:.0%}")

# %% [markdown]
# So take a plain layer to see what the network mixes up. Take the weighed projections to see which
# cases of *one* class are most like the input in what counts for that class.
#
# `Cole` does the latter: it is `SimilarExamples` with one of the two, which it makes itself.

# %%
from xplique.example_based import Cole

cole = Cole(**cases, model=wrapped, latent_layer="relu", k=3, case_returns="labels")
numbers = cole(inputs[misread], targets[misread])["labels"].numpy()
same = np.array_equal(numbers, neighbors["hidden × gradient"][misread])
print("Cole finds the same examples:", same)

# %% [markdown]
# !!! warning "Give it logits"
#     A model that ends in a softmax has next to no gradient where it is sure, and the projected
#     cases all but fall together. [`truncate`](../guide/wrap.md#truncate) cuts the softmax off.

# %% [markdown]
# ## Counterfactuals and semi-factuals
#
# What would be read differently? `NaiveCounterFactuals` returns the nearest case that is read as
# another class. And what would still be read the same? The KLEOR methods return a *semi-factual*:
# among the cases that are read like the input, the one nearest to that counterfactual.
# `KLEORGlobalSim` also wants it nearer to the input than the counterfactual is.
#
# Here they are for the first held-out digit of each class that is read rightly:

# %% alt="Five rows of ten pictures. The inputs are one digit of each class, and below each are the most similar training digit, two semi-factuals and a counterfactual. The similar digits are written alike. Counterfactuals are an 8 for the 3 and the 1, a 3 for the 2 and the 5, a 4 for the 6, a 9 for the 7, a 5 for the 8, a 0 for the 4 and the 9, and for the 0 a 5 read as 9. Semi-factuals are of the input's class, but for an 8 read as 1 and a 0 read as 4."
from xplique.example_based import KLEORGlobalSim, KLEORSimMiss, NaiveCounterFactuals

methods = {
    "Similar": SimilarExamples,
    "SimMiss": KLEORSimMiss,
    "GlobalSim": KLEORGlobalSim,
    "Counterfactual": NaiveCounterFactuals,
}
search = {
    name: method(**cases, projection=hidden, case_returns="labels")
    for name, method in methods.items()
}
first = [right[test_y[right] == digit][0] for digit in range(10)]

figure, rows = plt.subplots(5, 10, figsize=(8, 5), layout="constrained")
for axes, index in zip(rows[0], first):
    axes.imshow(enlarge(test_x[index]), cmap="gray")
for row, name in zip(rows[1:], search):
    found = search[name](test_x[first], one_hot[read[first]])["labels"].numpy()
    for axes, number in zip(row, found[:, 0]):
        axes.imshow(enlarge(train_x[number]), cmap="gray")
        axes.set_title(caption(number), fontsize=9)
for row, name in zip(rows, ["Input", *search]):
    row[0].set_ylabel(name, fontsize=8)
for axes in rows.flat:
    axes.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The counterfactual of the 3 is an 8, that of the 2 a 3, that of the 7 a 9: digits of nearly the
# same strokes. Not all are as close: the 9 has a 0.
#
# The two kinds of semi-factuals differ for the 1 and the 5 only. Of the four training digits that
# the network misreads, three are in this figure: an 8 as 1, a 0 as 4 and a 5 as 9. Who looks for
# the borders finds what lies on the wrong side of them.
#
# Two numbers say whether they are what they should be. Is a counterfactual of the network's second
# choice, the class with the second largest logit? And how near to the border with that class is a
# semi-factual? It is ranked among all training digits that are read like it, by how far its logit
# leads over the other one.


# %%
def rank_to_border(numbers, foreign):
    """Give the share of a case's class that is nearer to another one, as a median."""
    ranks = []
    for number, other in zip(numbers, train_read[foreign]):
        own = train_read[number]
        lead = train_logits[:, own] - train_logits[:, other]
        ranks.append((lead[train_read == own] < lead[number]).mean())
    return np.median(ranks)


second = np.argsort(logits)[asked, -2][~misread]
answers = {}
for name, method in search.items():
    answers[name] = method(inputs, targets)["labels"].numpy()[~misread, 0]
counterfactuals = answers["Counterfactual"]
agree = (train_read[counterfactuals] == second).mean()
print(f"Counterfactuals of the network's second choice: {agree:.0%}")
for name in ["Similar", "SimMiss", "GlobalSim"]:
    rank = rank_to_border(answers[name], counterfactuals)
    print(f"{name}: nearer to the border are {rank:.0%} of its class")

# %% [markdown]
# By chance the first would be 11%, one class in nine, and a digit in the middle of its class has
# 50% of it before it. The semi-factuals lie right at the border.
#
# !!! warning "Targets are required here, and are predictions"
#     `targets_dataset` says which cases count as another class. Give it what the model predicts for
#     them, one-hot, rather than their labels. The call needs the targets of the inputs as well:
#     without them it fails with `Attempt to convert a value (None)`.
#
# !!! warning "`KLEORGlobalSim` may find fewer than `k`"
#     Where the counterfactual is near, few cases of the input's class are nearer, or none. For each
#     one that is missing the label is -1, and its picture and its distance are infinite.

# %%
global_sim = KLEORGlobalSim(**cases, projection=hidden, k=3, case_returns="labels")
found = global_sim(test_x[wrong], one_hot[read[wrong]])["labels"].numpy()
missing = (found == -1).mean()
print(f"Of three semi-factuals for each misread digit {missing:.0%} are missing")

# %% [markdown]
# ## A counterfactual of a class of your choice
#
# `LabelAwareCounterFactuals` gets the class that is wanted as a third argument. Here are three of
# the inputs among the cases that are nearest to them in each other class:

# %% alt="Three rows of ten pictures, for a 3, a 7 and a 9: the input in its own column, and in each other column the nearest training digit of that class. The 8 beside the 3 has the same strokes, closed; the 9 beside the 7 has a loop instead of an open top, and the 1 a flag. Others, such as the 0 and the 4 beside the 3, look like any digit of their class."
from xplique.example_based import LabelAwareCounterFactuals

options = {"projection": hidden, "case_returns": ["labels", "distances"]}
aware = LabelAwareCounterFactuals(**cases, **options)
distances = {}
figure, rows = plt.subplots(3, 10, figsize=(8, 3), layout="constrained")
for row, digit in zip(rows, [3, 7, 9]):
    same = np.repeat(first[digit], 10)
    found = aware(test_x[same], one_hot[read[same]], one_hot)
    distances[digit] = found["distances"].numpy()[:, 0]
    for axes, number in zip(row, found["labels"].numpy()[:, 0]):
        axes.imshow(enlarge(train_x[number]), cmap="gray")
        axes.set_title(caption(number), fontsize=9)
    row[digit].imshow(enlarge(test_x[first[digit]]), cmap="gray")
    row[digit].set_title("input", fontsize=9)
for axes in rows.flat:
    axes.axis("off")
plt.show()

# %% [markdown]
# Some of them are close, such as the 8 and the 9 for the 3, or the 9 for the 7. Others are just
# the least unlike of their class. `distances` tells which; here for the 3, in the order of the
# network's logits:

# %%
ranking = [digit for digit in np.argsort(-logits[first[3]]) if digit != 3]
print("Class:   ", *(f"{digit:5}" for digit in ranking))
print("Logit:   ", *(f"{value:5.1f}" for value in logits[first[3]][ranking]))
print("Distance:", *(f"{value:5.1f}" for value in distances[3][ranking]))

# %% [markdown]
# The first five classes are in the same order by both, and a 4 is the least likely and the
# farthest.

# %% [markdown]
# ## Prototypes
#
# Which few training digits stand for all of them, in the eyes of the network? `ProtoGreedy`,
# `ProtoDash` and `MMDCritic` choose them one by one, so that the distribution of the chosen comes
# close to that of all. None of them is told the classes here.
#
# Called with inputs, each returns the nearest prototypes. So ten prototypes make a classifier:

# %%
from scipy.spatial.distance import cdist
from xplique.example_based import MMDCritic, ProtoDash, ProtoGreedy

ten = {"nb_global_prototypes": 10, "distance": "euclidean", "case_returns": "labels"}
prototypes = {}
for method in (ProtoGreedy, ProtoDash, MMDCritic):
    chosen = method(**cases, projection=hidden, **ten)
    found = chosen.get_global_prototypes()
    prototypes[method.__name__] = numbers = found["prototypes_labels"].numpy()
    weights = found["prototypes_weights"].numpy()
    nearest = chosen(test_x)["labels"].numpy()[:, 0]
    print(
        f"{method.__name__:11} {len(set(train_y[numbers]))} classes,"
        f" weights from {weights.min():.2f} to {weights.max():.2f},"
        f" nearest prototype right: {(train_y[nearest] == test_y).mean():.1%}"
    )


latent, train_latent = np.array(features(test_x)), np.array(features(train_x))


def nearest_right(numbers):
    nearest = numbers[cdist(latent, train_latent[numbers]).argmin(1)]
    return (train_y[nearest] == test_y).mean()


rng = np.random.default_rng(0)
at_random = [rng.choice(len(train_x), 10, replace=False) for _ in range(100)]
one_each = [
    np.array([rng.choice(np.flatnonzero(train_y == digit)) for digit in range(10)])
    for _ in range(100)
]
for name, draws in {"Ten": at_random, "One of each class": one_each}.items():
    covered = np.mean([len(set(train_y[numbers])) for numbers in draws])
    score = np.mean([nearest_right(numbers) for numbers in draws])
    print(f"{name} at random: {covered:.1f} classes, nearest right: {score:.1%}")

# %% alt="Three rows of ten training digits, chosen by ProtoGreedy, ProtoDash and MMD-critic. Each row has every digit from 0 to 9 once, in clear handwriting. The first two rows are the same; the third has another 7, 0 and 8."
figure, rows = plt.subplots(3, 10, figsize=(8, 2.8), layout="constrained")
for row, (name, numbers) in zip(rows, prototypes.items()):
    row[0].set_ylabel(name, fontsize=9)
    for axes, number in zip(row, numbers):
        axes.imshow(enlarge(train_x[number]), cmap="gray")
        axes.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Each row is a page of plain handwriting with all ten digits, while ten training digits at random
# have 6.4 classes in the mean. `ProtoGreedy` and `ProtoDash` choose the same ten. `MMDCritic` has
# another 7, 0 and 8; its weights, unlike those of the others, are always equal.
#
# How far a digit stands for others is up to the kernel $e^{-\gamma d^2}$ of the distance $d$. By
# default `gamma` is one over the number of features, here 1/64. A wider kernel:

# %%
for method in (ProtoGreedy, ProtoDash):
    chosen = method(**cases, projection=hidden, **ten, gamma=1 / 400)
    weights = chosen.get_global_prototypes()["prototypes_weights"].numpy()
    print(f"{method.__name__:11} prototypes with a weight: {(weights > 0).sum()} of 10")

# %% [markdown]
# !!! warning "`ProtoDash` needs a narrow kernel"
#     To find the next prototype, it has to take off what the chosen ones stand for already. In
#     Xplique 2.0.2 it takes their mean similarities for that, where the paper has their weights. With
#     a narrow kernel both are nearly the same. With a wide one it goes on choosing digits that are
#     not needed, and gives them no weight. `ProtoGreedy` does not have this problem.
#
# ## What can be combined
#
# Each method takes each projection, with two exceptions: prototypes are searched among vectors, so
# that images and feature maps have to be flattened, and `Cole` makes its projection itself. Here
# is one method of each kind with each of the five, and how well it did:
#
# - *similar*: the share of three neighbors that have the class read, for all 100 digits;
# - *counterfactual*: the share that are of the network's second choice;
# - *semi-factual*: the share of its class that is nearer to the border, with `KLEORSimMiss`;
# - *prototypes*: the classes among ten of `ProtoGreedy`, and how often the nearest of them is right.

# %% output="markdown"
print("| Projection | Similar | Counterfactual | Semi-factual | Prototypes |")
print("| :-- | --: | --: | --: | --: |")
for name, projection in projections.items():
    found = []
    for method in (NaiveCounterFactuals, KLEORSimMiss):
        explainer = method(**cases, projection=projection, case_returns="labels")
        found.append(explainer(inputs, targets)["labels"].numpy()[~misread, 0])
    foreign, own = found
    values = [
        share(neighbors[name], read[asked]),
        (train_read[foreign] == second).mean(),
        rank_to_border(own, foreign),
    ]
    line = [f"{value:.0%}" for value in values]
    try:
        chosen = ProtoGreedy(**cases, projection=projection, **ten)
        numbers = chosen.get_global_prototypes()["prototypes_labels"].numpy()
        nearest = chosen(test_x, one_hot[read])["labels"].numpy()[:, 0]
        hits = (train_y[nearest] == test_y).mean()
        line.append(f"{len(set(train_y[numbers]))} classes, {hits:.0%}")
    except AssertionError:
        line.append("need vectors")
    print(f"| {name} |", " | ".join(line), "|")

# %% [markdown]
# No projection is the best for all. The hidden layer has the best counterfactuals, semi-factuals
# at the very border, and prototypes of all classes.
#
# Weighed by gradients, the classes are far apart, so that neighbors are of the class read, but the
# nearest case of another class says little. The prototypes in the last row do not read by
# themselves either: they are asked about what the network reads.
#
# ## Sources
#
# - An overview of all four kinds: Poché, Hervier and Bakkay (2023), [*Natural Example-Based
#   Explainability: a Survey*](https://arxiv.org/abs/2309.03234)
# - Cole: Kenny and Keane (2019), [*Twin-Systems to Explain Artificial Neural Networks using
#   Case-Based Reasoning*](https://doi.org/10.24963/ijcai.2019/376)
# - KLEOR: Cummins and Bridge (2006), [*KLEOR: A Knowledge Lite Approach to Explanation Oriented
#   Retrieval*](https://www.cai.sk/ojs/index.php/cai/article/view/338)
# - ProtoGreedy and ProtoDash: Gurumoorthy, Dhurandhar, Cecchi and Aggarwal (2019), [*Efficient Data
#   Representation by Selecting Prototypes with Importance
#   Weights*](https://arxiv.org/abs/1707.01212)
# - MMD-critic: Kim, Khanna and Koyejo (2016), [*Examples are not Enough, Learn to Criticize!
#   Criticism for Interpretability*](https://proceedings.neurips.cc/paper_files/paper/2016/file/5680522b8e2bb01943234bce7bf84534-Paper.pdf)
