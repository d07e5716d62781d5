# %% [markdown]
# # A gallery of all attribution methods
#
# All 17 attribution methods of Xplique explain one scene and one model, in one figure. The scene
# holds two handwritten digits on a photograph, so you know what an answer should look like: asked
# about one digit, an explanation should point at it, and not at the other one or at the photograph.

# %% [markdown]
# ## Scenes with two digits
#
# The material is real: scikit-learn's handwritten digits, enlarged to 16×16 pixels and written in
# white on crops of its two photographs, which are darkened a little. Training and test scenes share
# no digit and no part of a photograph.

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

# %% alt="Six scenes: crops of a photograph of a temple or of a flower, each with two white digits."
import matplotlib.pyplot as plt

figure, row = plt.subplots(1, 6, figsize=(8, 1.7))
for axes, i in zip(row, [292, 46, 484, 215, 420, 211]):
    axes.imshow(test_x[i])
    axes.set_title("{} and {}".format(*test_labels[i]), fontsize=10)
    axes.axis("off")

plt.show()

# %% [markdown]
# ## A model that finds the digits
#
# The network says for each of the ten digits whether it is somewhere in the scene. It takes the
# maximum of the last feature maps over all places, so each digit can be found wherever it stands.

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
# ## Wrap it, and make the explainers
#
# With `input_shape` the wrapped model has layers, which Grad-CAM, Grad-CAM++, FEM, Guided Backprop
# and DeconvNet need. `summary` shows their names.

# %%
from xplique_flax import FlaxWrapper

wrapped = FlaxWrapper(model, params, input_shape=(48, 48, 3))
wrapped.summary(line_length=72)

# %% [markdown]
# Most methods are content with the model. Those that perturb the scene also need to know what a
# removed pixel looks like: black, which is as far from white ink as a color can be. It is the
# default of all but Lime and Kernel SHAP, which take a mid-gray for inputs of three channels.
#
# !!! tip "Grad-CAM, Grad-CAM++ and FEM: pick the ReLU"
#     By default these three take the last convolution. In a Flax model the ReLU after it is a
#     layer of its own, so the default gives the values *before* the ReLU. The papers mean those
#     after it: `conv_layer="relu_3"`. [Grad-CAM and inner layers](residual_network.py) has more.

# %%
import tensorflow as tf
from xplique import attributions as xa

removed = {"batch_size": 200, "ref_value": np.zeros(3)}
last = {"conv_layer": "relu_3"}
noise = {"noise": 0.1, "nb_samples": 50}
explainers = {
    "Saliency": xa.Saliency(wrapped),
    "Gradient Input": xa.GradientInput(wrapped),
    "Integrated Gradients": xa.IntegratedGradients(wrapped, steps=50),
    "SmoothGrad": xa.SmoothGrad(wrapped, **noise),
    "SquareGrad": xa.SquareGrad(wrapped, **noise),
    "VarGrad": xa.VarGrad(wrapped, **noise),
    "Guided Backprop": xa.GuidedBackprop(wrapped),
    "DeconvNet": xa.DeconvNet(wrapped),
    "Grad-CAM": xa.GradCAM(wrapped, **last),
    "Grad-CAM++": xa.GradCAMPP(wrapped, **last),
    "FEM": xa.FEM(wrapped, **last),
    "Occlusion": xa.Occlusion(wrapped, patch_size=6, patch_stride=2),
    "Rise": xa.Rise(wrapped, nb_samples=2000, batch_size=256),
    "Lime": xa.Lime(wrapped, nb_samples=400, **removed),
    "Kernel SHAP": xa.KernelShap(wrapped, nb_samples=400, **removed),
    "Sobol": xa.SobolAttributionMethod(wrapped, grid_size=8, nb_design=16),
    "HSIC": xa.HsicAttributionMethod(wrapped, grid_size=8, nb_design=500),
}

# %% [markdown]
# ## All maps of one scene
#
# The same scene is explained twice, once for each of its digits: the inputs hold it twice, and the
# targets are one-hot, one row per question. A map has one value per pixel, whatever the number of
# color channels.

# %%
chosen = 292
inputs = test_x[[chosen, chosen]]
targets = np.eye(10, dtype="float32")[test_labels[chosen]]
print("Digits:", test_labels[chosen])
print("Probabilities:", nn.sigmoid(model.apply(params, inputs[:1])).round(2))

tf.random.set_seed(0)
maps = {}
for name, explainer in explainers.items():
    maps[name] = np.array(explainer(inputs, targets))[..., 0]
print("Maps:", len(maps), "of shape", maps["Saliency"].shape[1:])

# %% [markdown]
# The first question: why is there an 8? The box in the first picture marks it, and both digits are
# marked in the others. Maps that say for *and* against are drawn in red (for) and blue (against);
# the others from dark (least) to yellow (most). Each map has a color scale of its own.

# %% alt="The scene, an 8 on the left and a 7 on the right on the petals of a flower, and 17 maps of its 8. The gradients form a spotted pattern on the 8. Grad-CAM, Occlusion, Rise, Sobol and HSIC show a spot on it, Lime and Kernel SHAP its whole shape. FEM marks the 7 more than the 8."
signed = {
    "Gradient Input", "Integrated Gradients", "SmoothGrad", "Guided Backprop",
    "DeconvNet", "Occlusion", "Lime", "Kernel SHAP",
}  # fmt: skip


def mark(axes, corner, color="gray"):
    y, x = corner - 0.5
    axes.add_patch(plt.Rectangle((x, y), 16, 16, fill=False, edgecolor=color))


def gallery(question):
    figure, rows = plt.subplots(3, 6, figsize=(8, 4.6), layout="constrained")
    scene, *others = rows.flat
    scene.imshow(inputs[question])
    scene.set_title(f"Why the {test_labels[chosen, question]}?", fontsize=9)
    mark(scene, corners[chosen, question], "cyan")
    for axes, (name, pair) in zip(others, maps.items()):
        if name in signed:
            limit = np.abs(pair[question]).max()
            colors = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        else:
            colors = {"cmap": "viridis"}
        axes.imshow(pair[question], **colors)
        axes.set_title(name, fontsize=9)
        for corner in corners[chosen]:
            mark(axes, corner)
    for axes in rows.flat:
        axes.axis("off")


gallery(0)
plt.show()

# %% [markdown]
# The second question is about the same scene, model and explainers. Only the target differs: why is
# there a 7?

# %% alt="The same scene and 17 maps of its 7. All but one have moved from the 8 to the 7: Guided Backprop, Lime and Kernel SHAP show its shape, Grad-CAM, Occlusion, Rise, Sobol and HSIC a spot on it. Occlusion, Lime and Kernel SHAP show the 8 in blue. The map of FEM is the same as before."
gallery(1)
plt.show()

# %% [markdown]
# ## How much of each map lies on the right digit
#
# A number says the same for all maps: of the 5 % of pixels with the highest values, which share
# lies in the box of the digit asked about? A box is 11 % of the scene, so that is what a random
# map would have.

# %% output="markdown"
highest = 115  # of 48 * 48 pixels
first, second = test_labels[chosen]
print(f"| Method | Asked about the {first} | Asked about the {second} |")
print("| :-- | --: | --: |")
for name, pair in maps.items():
    shares = []
    for picture, (y, x) in zip(pair, corners[chosen]):
        box = np.zeros((48, 48), bool)
        box[y : y + 16, x : x + 16] = True
        top = np.argsort(picture, axis=None)[-highest:]
        shares.append(f"{box.flat[top].mean():.0%}")
    print(f"| {name} | {shares[0]} | {shares[1]} |")

# %% [markdown]
# FEM does not look at the target: its map is the same for both questions, and shows where the
# last layer is active. All others change with the question, most of them clearly: VarGrad and
# Grad-CAM++ still have a peak on the 7 when asked about the 8. One scene does not rank them; that
# takes many scenes, and measures that need no boxes, as in [Choosing a method with
# metrics](choosing_with_metrics.py). And that a map looks right does not mean that it shows what
# the model does: see [Sanity checks by randomizing the model](sanity_checks.py).

# %% [markdown]
# ## What each method computes
#
# Here $f(x)$ is the score that is explained, the logit of the target, for the scene $x$; $\nabla f$
# is its gradient with respect to the pixels; $A^k$ is the $k$-th feature map of the chosen layer;
# $\varepsilon$ is random noise and $m$ a random mask. Superpixels are regions of similar color.
#
# | Method | What its map shows |
# | :-- | :-- |
# | Saliency | $\lvert\nabla f(x)\rvert$: how strongly the score reacts to a small change of each pixel |
# | Gradient Input | $x \odot \nabla f(x)$: the gradient times the pixel, so black pixels get nothing |
# | Integrated Gradients | $(x - x_0) \odot \int_0^1 \nabla f(x_0 + t\,(x - x_0))\,dt$: the score's change along a straight path from the baseline $x_0$, black here, shared out among the pixels |
# | SmoothGrad | $\mathbb{E}\,[\nabla f(x + \varepsilon)]$: the mean gradient around the scene |
# | SquareGrad | $\mathbb{E}\,[\nabla f(x + \varepsilon)^2]$: the mean of its square |
# | VarGrad | $\operatorname{Var}\,[\nabla f(x + \varepsilon)]$: its variance |
# | Guided Backprop | The gradient, where each ReLU passes back only what is positive, and only where it is active |
# | DeconvNet | The gradient, where each ReLU passes back only what is positive, active or not |
# | Grad-CAM | $\operatorname{ReLU}\big(\sum_k \alpha_k A^k\big)$, where $\alpha_k$ is the mean of $\partial f / \partial A^k$ over all places, enlarged to the scene's size |
# | Grad-CAM++ | The same, where $\alpha_k$ is a weighted mean of the positive gradients only |
# | FEM | The places where a feature map is more than two standard deviations above its mean, summed over the maps, each weighted by its mean; no gradient, no target |
# | Occlusion | $\sum f(x) - f(x \text{ without a patch})$ over the patches that cover the pixel |
# | Rise | $\mathbb{E}\,[f(x \odot m)\,m] / \mathbb{E}\,[m]$: the mean score of the masked scenes that show the pixel |
# | Lime | The coefficients of a linear model, fitted to the scores of scenes from which random superpixels were removed, with more weight for those that are closer to $x$ |
# | Kernel SHAP | The same, where the subsets are drawn so that the coefficients estimate Shapley values |
# | Sobol | $\mathbb{E}\,[\operatorname{Var}(f \mid m_{\sim i})] / \operatorname{Var}(f)$ for each cell $i$ of a grid: the share of the score's variance, under random masks, in which the cell takes part |
# | HSIC | How much the score depends on whether the cell is shown, as the Hilbert–Schmidt independence criterion |
#
# The first ten rows need gradients, and FEM the feature maps only. Occlusion and those after it
# just call the model, many times. [Step 3](../guide/use.md) says how to pass targets, operators
# and batch sizes, and the [FAQ](../faq.md) shows that each method gives for a Flax model what it
# gives for its Keras twin.

# %% [markdown]
# ## Sources
#
# - **Saliency**: Simonyan, Vedaldi and Zisserman (2013), *Deep Inside Convolutional Networks:
#   Visualizing Image Classification Models and Saliency Maps*
# - **Gradient Input**: Shrikumar, Greenside, Shcherbina and Kundaje (2016), *Not Just a Black Box:
#   Learning Important Features Through Propagating Activation Differences*
# - **Integrated Gradients**: Sundararajan, Taly and Yan (2017), *Axiomatic Attribution for Deep
#   Networks*
# - **SmoothGrad**: Smilkov, Thorat, Kim, Viégas and Wattenberg (2017), *SmoothGrad: removing
#   noise by adding noise*
# - **SquareGrad**: Hooker, Erhan, Kindermans and Kim (2019), *A Benchmark for Interpretability
#   Methods in Deep Neural Networks*
# - **VarGrad**: Adebayo, Gilmer, Muelly, Goodfellow, Hardt and Kim (2018), *Sanity Checks for
#   Saliency Maps*
# - **Guided Backprop**: Springenberg, Dosovitskiy, Brox and Riedmiller (2014), *Striving for
#   Simplicity: The All Convolutional Net*
# - **DeconvNet** and **Occlusion**: Zeiler and Fergus (2013), *Visualizing and Understanding
#   Convolutional Networks*
# - **Grad-CAM**: Selvaraju, Cogswell, Das, Vedantam, Parikh and Batra (2017), *Grad-CAM: Visual
#   Explanations from Deep Networks via Gradient-based Localization*
# - **Grad-CAM++**: Chattopadhay, Sarkar, Howlader and Balasubramanian (2018), *Grad-CAM++:
#   Generalized Gradient-based Visual Explanations for Deep Convolutional Networks*
# - **FEM**: Fuad, Martin, Giot, Bourqui, Benois-Pineau and Zemmari (2020), *Features
#   Understanding in 3D CNNs for Actions Recognition in Video*
# - **Rise**: Petsiuk, Das and Saenko (2018), *RISE: Randomized Input Sampling for Explanation of
#   Black-box Models*
# - **Lime**: Ribeiro, Singh and Guestrin (2016), *"Why Should I Trust You?": Explaining the
#   Predictions of Any Classifier*
# - **Kernel SHAP**: Lundberg and Lee (2017), *A Unified Approach to Interpreting Model Predictions*
# - **Sobol**: Fel, Cadène, Chalvidal, Cord, Vigouroux and Serre (2021), *Look at the Variance!
#   Efficient Black-box Explanations with Sobol-based Sensitivity Analysis*
# - **HSIC**: Novello, Fel and Vigouroux (2022), *Making Sense of Dependence: Efficient Black-box
#   Explanations Using Dependence Measure*
