# %% [markdown]
# # Feature visualization: what a network looks for
#
# An attribution says which pixels of one picture matter. A feature visualization needs no picture:
# it asks which picture a part of the network would like best, and finds it by optimization. Here
# the ten outputs of a network for handwritten digits draw the ten digits, well enough for a
# classifier that never saw the network to read them all. Channels draw strokes, and directions
# draw what tells one digit from another.

# %% [markdown]
# ## A network that is hard to fool
#
# Scikit-learn's digits are enlarged to $16 \times 16$ pixels, with a margin of two. The network
# first makes the mean of each picture 0 and its standard deviation 1. So it sees shapes only: a
# picture cannot please it by being brighter.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

images, digits = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8, 1)
images = jax.image.resize(images, (len(images), 16, 16, 1), "cubic")
images = np.pad(np.clip(images, 0, 1), [(0, 0), (2, 2), (2, 2), (0, 0)])
split = train_test_split(images, digits, random_state=0)
train_x, test_x, train_y, test_y = split


class DigitNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.standardize(x, axis=(1, 2, 3))
        x = nn.relu(nn.Conv(24, (5, 5), strides=(2, 2))(x))
        x = nn.relu(nn.Conv(48, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


# %% [markdown]
# Whether a visualization can be read depends on the training. If changes that nobody sees can fool
# a network, its outputs are high for pictures that look like nothing. [Adversarial
# training](https://arxiv.org/abs/1706.06083) helps: each batch is first changed, within a given
# `radius`, so that the loss rises. [Features that are learned in this
# way](https://arxiv.org/abs/1906.00945) are closer to what people see.

# %%
model = DigitNet()
params = jax.jit(model.init)(jax.random.key(0), train_x[:1])
steps = 400
optimizer = optax.adam(optax.cosine_onecycle_schedule(steps, 5e-3))
state = optimizer.init(params)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def loss(params, x, y):
    return cross_entropy(model.apply(params, x), y).mean()


def length(x):
    return jnp.sqrt((x**2).sum(axis=(1, 2, 3), keepdims=True)) + 1e-9


def attack(params, x, y, radius):
    """Change each picture by at most `radius`, in two steps that raise the loss."""
    change = jnp.zeros_like(x)
    for _ in range(2):
        gradient = jax.grad(loss, argnums=1)(params, x + change, y)
        change += 0.75 * radius * gradient / length(gradient)
        change *= jnp.minimum(1, radius / length(change))
    return jnp.clip(x + change, 0, 1)


@jax.jit
def step(params, state, x, y, radius):
    x = attack(params, x, y, radius)
    updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
    return optax.apply_updates(params, updates), state


rng = np.random.default_rng(0)
for i in range(steps):
    batch = rng.choice(len(train_x), 64)
    x = np.roll(train_x[batch], rng.integers(-1, 2, 2), axis=(1, 2))
    radius = min(1.0, 2 * i / steps)
    params, state = step(params, state, x, train_y[batch], radius)

accuracy = (jax.jit(model.apply)(params, test_x).argmax(-1) == test_y).mean()
print(f"Accuracy on held-out digits: {accuracy:.1%}")

# %% [markdown]
# ## What each logit looks for
#
# An `Objective` says what is to be maximized. `Objective.neuron` takes numbers of a layer, counted
# in its flattened output: those of the last layer are the logits. For a list of numbers, as many
# pictures are optimized side by side. `list_layers` has the names of the layers.
#
# `optimize` starts from noise and climbs. Its defaults are made for networks of photographs. For a
# small one, three options matter:
#
# - `custom_shape=None` optimizes pictures of the model's size. The default is $512 \times 512$,
#   which is resized to that of the model at each step.
# - `transformations` change the pictures at random before each step, so that what is drawn does not
#   hang on single pixels. Here they are shifted and scaled a little.
# - `values_range`, by default 0 to 1, has to be the range that the model was trained on.

# %%
import tensorflow as tf
from xplique import features_visualizations as fv
from xplique.features_visualizations import Objective

from xplique_flax import FlaxWrapper

wrapped = FlaxWrapper(model, params, input_shape=(20, 20, 1))
print([layer.name for layer in wrapped.list_layers() if layer.shape])

shake = fv.compose_transformations(
    [fv.pad(2), fv.random_jitter(4), fv.random_scale((0.9, 1.1))],
)


def visualize(objective, transformations=shake, **options):
    tf.random.set_seed(0)  # the same noise to start from
    pictures, names = fv.optimize(
        objective,
        nb_steps=100,
        custom_shape=None,
        transformations=transformations,
        **options,
    )
    return np.array(pictures[-1])


def logits(digits):
    return Objective.neuron(wrapped, "Dense_1", digits)


ten = list(range(10))
of_logits = visualize(logits(ten))

# %% [markdown]
# There are two checks. Below each visualization stands the training picture with the highest value
# of that logit. And a support vector machine, which learned from the same training pictures and
# knows nothing of the network, reads the visualizations.

# %% alt="Two rows of ten pictures. Above, the visualizations of the ten logits: bright strokes on a dark, slightly noisy ground that form the digits 0 to 9. The 2 is faint in the middle, and the 4 lacks its stem. Below, the training pictures with the highest logits, clean digits 0 to 9."
import matplotlib.pyplot as plt
from sklearn.svm import SVC

reader = SVC().fit(train_x.reshape(len(train_x), -1), train_y)
accuracy = reader.score(test_x.reshape(len(test_x), -1), test_y)
print(f"Accuracy of the reader on held-out digits: {accuracy:.1%}")
print("It reads:", reader.predict(of_logits.reshape(10, -1)))


def show(rows, titles=()):
    count = len(next(iter(rows.values())))
    size = 8, 8 * len(rows) / count + 0.2 * len(titles[:1])
    figure, grid = plt.subplots(len(rows), count, figsize=size, layout="constrained")
    for row, (name, pictures) in zip(grid, rows.items()):
        row[0].set_ylabel(name, fontsize=9)
        for axes, picture in zip(row, pictures):
            axes.imshow(picture, cmap="gray")
            axes.set(xticks=[], yticks=[], frame_on=not np.isnan(picture).all())
    for axes, title in zip(grid[0], titles):
        axes.set_title(title, fontsize=9)


closest = np.argmax(wrapped(train_x), axis=0)
show({"logit": of_logits, "training": train_x[closest]})
plt.show()

# %% [markdown]
# No picture went into the upper row: it is drawn from the weights alone, and all ten are read
# right. It has the strokes that speak for a digit most, not all strokes of one: the 4 lacks its
# stem.

# %% [markdown]
# ## What the options do
#
# - `use_fft=False` optimizes pixels. The default optimizes the coefficients of the picture's
#   Fourier transform instead, [in which low frequencies move
#   faster](https://distill.pub/2017/feature-visualization/); `fft_decay` says by how much.
# - `transformations` are those from above, or none. `"standard"` is the default of `optimize`.
# - `regularizers` are subtracted from the objective. Here it is the total variation, which is high
#   for noise; `l1_reg` and `l2_reg` keep pictures dark.

# %% alt="Five rows of the ten logits' visualizations. Pixels and Fourier without transformations: digits on noisy ground, some with gaps or additional strokes. With transformations: clear digits on a dark ground. With total variation: smooth, darker digits, nearly all with one single white pixel. Standard transformations: gray smears."
smooth = [fv.total_variation_reg(1e-3)]
settings = {
    "pixels": visualize(logits(ten), None, use_fft=False),
    "Fourier": visualize(logits(ten), None),
    "+ shake": of_logits,
    "+ TV": visualize(logits(ten), regularizers=smooth),
    "standard": visualize(logits(ten), "standard"),
}
for name, pictures in settings.items():
    right = reader.predict(pictures.reshape(10, -1)) == ten
    print(f"{name:8} {right.sum():2} of 10 read as their digit")
show(settings)
plt.show()

# %% [markdown]
# The transformations matter most: with them all ten are read, without them six, and with unfit ones
# two. The total variation removes what noise is left.
#
# !!! warning "Pitfalls of `optimize`"
#     - The standard transformations blur, crop, and flip left and right at random. A digit is no
#       digit any more when it is flipped. For small pictures, and wherever left and right differ,
#       compose your own. `random_blur` is for three channels; for one there is
#       `transformations.random_blur_grayscale`.
#     - At each step Xplique stretches the picture to the whole of `values_range`. With a
#       regularizer, one white pixel fills the range, and the rest gets as dark as the regularizer
#       wants it: see the row "+ TV". Raise the factor with care.

# %% [markdown]
# ## Inside: a layer, its channels, its neurons
#
# For a layer whose output has the shape $(H, W, C)$ there are three objectives:
#
# - `layer` asks for large values anywhere in it;
# - `channel` asks for a large mean of one channel over all places;
# - `neuron` asks for one channel at one place, whose number is $(y\,W + x)\,C + c$.
#
# Here the layer is the second convolution after its ReLU, the place is the middle, and the channels
# are the nine with the highest values. The pictures of the neurons are shifted less, since the
# place counts, and cut to the $9 \times 9$ pixels that one place of this layer sees.
#
# For a check, there are three patches of that size: those in which the channel has its highest
# values, each from another training picture.

# %%
layer = "relu_1"
maps = np.array(wrapped.truncate(layer)(train_x))
_, height, width, count = maps.shape
channels = np.argsort(-maps.max(axis=(0, 1, 2)))[:9].tolist()
middle = (height // 2 * width + width // 2) * count
neurons = [middle + channel for channel in channels]

shift = fv.compose_transformations([fv.pad(1), fv.random_jitter(2)])
of_layer = visualize(Objective.layer(wrapped, layer))
of_channels = visualize(Objective.channel(wrapped, layer, channels))
objective = Objective.neuron(wrapped, layer, neurons)
of_neurons = visualize(objective, shift, warmup_steps=20)[:, 7:16, 7:16]

# %% alt="Five rows of ten pictures, first for the whole layer, then for nine channels. The channels' pictures are filled with stripes, upright, level or slanting, the neurons' show one stroke each, of the same slope, or an arch. Below, three patches of digits for each channel, with such strokes and arches. The layer's picture has two thick level strokes."
activations = [(maps**2).sum(axis=-1), *np.moveaxis(maps[..., channels], -1, 0)]
padded = np.pad(train_x, [(0, 0), (4, 4), (4, 4), (0, 0)])
patches = np.empty((3, 10, 9, 9, 1))
for column, activation in enumerate(activations):
    best = np.argsort(-activation.max(axis=(1, 2)))[:3]
    for row, picture in enumerate(best):
        y, x = np.unravel_index(activation[picture].argmax(), (height, width))
        seen = padded[picture, 4 * y + 3 : 4 * y + 12, 4 * x + 3 : 4 * x + 12]
        patches[row, column] = seen

nothing = np.full((9, 9, 1), np.nan)
rows = {
    "channel": [of_layer[0], *of_channels],
    "neuron": [nothing, *of_neurons],
    "patches": patches[0],
    " ": patches[1],
    "  ": patches[2],
}
show(rows, ["layer", *channels])
plt.show()

means = patches[:, 1:].mean(axis=0)
alike = np.corrcoef(of_neurons.reshape(9, -1), means.reshape(9, -1))[:9, 9:]
others = alike[~np.eye(9, dtype=bool)]
print(f"Correlation of a neuron's picture with its patches: {alike.diagonal().mean():.2f}")
print(f"with the patches of the other channels: {others.mean():.2f}")

# %% [markdown]
# The channels of this layer look for strokes, most of them of one slope. A channel's picture
# repeats the stroke, since the objective is a mean over all places; a neuron's has it once, as the
# patches do. The whole layer likes two level strokes best, which says less.
#
# !!! tip "A ReLU that is 0 gives no gradient"
#     Many neurons after a ReLU are 0 for the noise from which `optimize` starts. They have no
#     gradient then, and would stay noise. `warmup_steps=20` makes 20 steps in advance, with a
#     copy of the model whose ReLUs pass every gradient. The other way out is the layer before the
#     ReLU, here `"Conv_1"`.

# %% [markdown]
# ## A direction in latent space
#
# `Objective.direction` takes vectors of a layer's shape. Its score is the product of the dot
# product and a power of the cosine between the layer's output and the vector.
#
# Here a vector is what distinguishes two digits for the network: the difference of their means in
# the last layer but one. What it draws should look like what distinguishes them in the pictures,
# the difference of the mean pictures.

# %% alt="Two rows of ten pictures. Above, differences of mean pictures, such as 8 minus 3, light where the first digit has more ink, dark where the second has. Below, the visualized directions, with bright strokes where the picture above is light: on the left side for 8 minus 3, on the right for 3 minus 8, in the lower half for 6 minus 5, in the upper one for 5 minus 6."
latent = np.array(wrapped.truncate("relu_2")(train_x))
pairs = [(8, 3), (3, 8), (6, 5), (5, 6), (0, 6), (9, 4), (5, 9), (7, 1), (2, 7), (9, 3)]


def differences(values):
    means = np.array([values[train_y == digit].mean(axis=0) for digit in ten])
    return np.array([means[digit] - means[other] for digit, other in pairs])


vectors = [tf.constant(vector) for vector in differences(latent)]
of_directions = visualize(Objective.direction(wrapped, "relu_2", vectors))

expected = differences(train_x)
titles = [f"{digit} − {other}" for digit, other in pairs]
show({"pictures": expected, "direction": of_directions}, titles)
plt.show()

alike = np.corrcoef(of_directions.reshape(10, -1), expected.reshape(10, -1))[:10, 10:]
print(f"Mean correlation with its own difference: {alike.diagonal().mean():.2f}")
print("Closest of the ten:", *[titles[i] for i in alike.argmax(axis=1)])

# %% [markdown]
# Each direction is closest to the difference that it was made from. It draws what the first digit
# has and the second has not: for $8 - 3$ the strokes on the left that close an 8, for $3 - 8$ a
# shape that is open to the left, for $6 - 5$ the lower loop.

# %% [markdown]
# ## Sums of objectives
#
# Objectives can be added, and weighted by a factor. Lists are combined, each with each: two channels
# and ten logits make twenty pictures. Here digits are to be drawn with the strokes of a channel.

# %% alt="Three rows of ten pictures: the ten logits, and the same with the first and the second channel of the figure before. In the lower rows the digits are made of strokes of that channel's slope: the 3, 5 and 8 change most, and the 8 becomes a row of parallel strokes in the last row."
two = Objective.channel(wrapped, layer, channels[:2]) * 30.0
of_both = visualize(two + logits(ten))
names = ["logit", f"+ {channels[0]}", f"+ {channels[1]}"]
of_sums = np.concatenate([of_logits, of_both])
show(dict(zip(names, of_sums.reshape(3, 10, 20, 20, 1))))
plt.show()

reached = np.array(wrapped(of_sums))[range(30), 3 * ten].reshape(3, 10)
of_layer = np.array(wrapped.truncate(layer)(of_sums)).mean(axis=(1, 2))
of_layer = of_layer[:, channels[:2]].reshape(3, 10, 2)
for name, logit, channel in zip(names, reached.mean(axis=1), of_layer.mean(axis=1)):
    print(f"{name:6} mean logit {logit:.1f}, mean channels {channel.round(2)}")

# %% [markdown]
# The pictures are a compromise. With a channel added, its mean is higher and the logits are lower
# than without.
#
# !!! warning "Write the objective with a factor first, and do not subtract"
#     Xplique 2.0.2 multiplies the sum up to each objective by its factor, instead of the objective
#     alone. So `a - b` is computed as $-(a + b)$, and `a + b * 2.0` as $2\,(a + b)$. Only the first
#     objective of a sum can have a factor of its own. It is so for native Keras models, too.
#
#     Objectives of two layers cannot be added if the first axes of their outputs have the same
#     length but not the number of axes: $(10, 10, 24)$ and $(10)$ end in `could not broadcast input
#     array`.
#
# Here the objectives are computed for one picture, without optimizing it:

# %%
three = train_x[closest[3]][None]
a, b = np.array(wrapped(three))[0, [3, 8]]
print(f"Logit of 3: {a:.2f}, of 8: {b:.2f}, difference: {a - b:.2f}")

for name, objective in {
    "3 - 8": logits(3) - logits(8),
    "8 * -1.0 + 3": logits(8) * -1.0 + logits(3),
}.items():
    parts, score, _, _ = objective.compile()
    value = 10 * float(score(parts([three]))[0])  # it is a mean over the ten logits
    print(f"{name}: {value:.2f}")

# %% [markdown]
# ## MaCo
#
# [MaCo](https://arxiv.org/abs/2306.06805) keeps the magnitudes of the Fourier transform as they are
# on average in a dataset, and optimizes the phases alone. What it draws then has the frequencies of
# real pictures, without a regularizer. These options have to be given for a small network:
#
# - `maco_dataset`, batches of the pictures whose magnitudes are taken. Without it Xplique takes those
#   of ImageNet, for three channels only.
# - `custom_shape` and `box_size`: the default optimizes a picture of $512 \times 512$ by smaller and
#   smaller crops. A digit is whole only in a crop as large as the picture, `box_size=1.0`.
# - `values_range`: the default is -1 to 1, other than that of `optimize`.
#
# One objective is optimized at a time, and it must not be a sum. Here they are the logits of the odd
# digits.

# %% alt="Two rows of five pictures. Above, MaCo's pictures of the logits of 1, 3, 5, 7 and 9: broad bright strokes in the shape of the digits, on a gray, mottled ground. Below, their transparencies, brightest on some strokes: the foot of the 1, the upper strokes of the 3, 5 and 7; the edges are dark."
of_data = tf.data.Dataset.from_tensor_slices(train_x).batch(500)


def visualize_by_maco(objective):
    tf.random.set_seed(0)
    return fv.maco(
        objective,
        maco_dataset=of_data,
        nb_steps=40,
        nb_crops=16,
        box_size=1.0,
        noise_intensity=0.2,
        values_range=(0, 1),
        custom_shape=(20, 20),
    )


odd = [1, 3, 5, 7, 9]
results = [visualize_by_maco(logits(digit)) for digit in odd]
of_maco = np.array([picture for picture, _ in results])
transparency = np.array([values for _, values in results])
show({"MaCo": of_maco, "transparency": transparency}, odd)
plt.show()

means = np.array([train_x[train_y == digit].mean(axis=0) for digit in ten])
alike = np.corrcoef(of_maco.reshape(5, -1), means.reshape(10, -1))[:5, 5:]
print("Mean digit with the highest correlation:", alike.argmax(axis=1))

# %% [markdown]
# The digits are thick, on a ground that is not black: the magnitudes alone do not say that the
# margin is empty, and the crops are not centered, so that the digit has to fill its place. Among
# the mean pictures of the ten digits, each is most like that of its own digit.
#
# The second thing that `maco` returns is the sum of the absolute gradients over all steps, which
# says where the picture mattered. It can be used as transparency: what did not matter vanishes.
#
# !!! tip "Large networks"
#     For a network of photographs the defaults of `optimize` and `maco` are a good start, but for
#     `maco_dataset`, which should hold pictures like those that the network was trained on.

# %% [markdown]
# ## What it shows, and what it does not
#
# A feature visualization is the extreme of an objective, not an example. It shows what drives a part
# of the network to its maximum, and other, quite different pictures may do so nearly as well. So
# read it together with the data: the training pictures or patches of the highest activation, as
# above.
#
# For what the network looks at in one picture, see the attributions: [A gallery of all
# methods](methods_gallery.py).

# %% [markdown]
# ## Sources
#
# - **Feature visualization**: Olah, Mordvintsev and Schubert (2017), [*Feature
#   Visualization*](https://distill.pub/2017/feature-visualization/)
# - **MaCo**: Fel, Boissin, Boutin, Picard, Novello, Colin, Linsley, Rousseau, Cadène, Goetschalckx,
#   Gardes and Serre (2023), [*Unlocking Feature Visualization for Deeper Networks with MAgnitude
#   Constrained Optimization*](https://arxiv.org/abs/2306.06805)
# - **Adversarial training**: Madry, Makelov, Schmidt, Tsipras and Vladu (2018), [*Towards Deep
#   Learning Models Resistant to Adversarial Attacks*](https://arxiv.org/abs/1706.06083)
# - **Its features**: Engstrom, Ilyas, Santurkar, Tsipras, Tran and Madry (2019), [*Adversarial
#   Robustness as a Prior for Learned Representations*](https://arxiv.org/abs/1906.00945)
