# %% [markdown]
# # Save, restore and explain a checkpoint
#
# You will have saved a Flax training state with Orbax while it learns, restored it from
# its files alone, and found its explanations equal to the bit. The same checkpoints then
# show how the explanations of one image came about during training.
#
# Orbax is the checkpointing library of the JAX ecosystem, and is installed with Flax.
#
# !!! info "The wrapped model is not what is saved"
#     `FlaxWrapper` refuses Keras's `save` and `save_weights`. Keep the
#     parameters of the Flax module, and wrap them again: the rest is code.
#
# ## Train, and save on the way
#
# One function makes the training state. Whoever restores it later needs this function,
# too: it describes the structure that the files have to fill.

# %%
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

images, digits = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
split = train_test_split(images, digits, random_state=0)
train_x, test_x, train_y, test_y = split


class CNN(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


model = CNN()


def create_state(key):
    params = model.init(key, train_x[:1])["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(3e-3))


# %% [markdown]
# A `CheckpointManager` looks after a folder with one subfolder per saved step. Here the
# folder is a temporary one.


# %%
@jax.jit
def step(state, x, y):
    def loss(params):
        logits = state.apply_fn({"params": params}, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name) / "run"

options = ocp.CheckpointManagerOptions(max_to_keep=None)
state = create_state(jax.random.key(0))
rng = np.random.default_rng(0)
with ocp.CheckpointManager(folder, options=options) as manager:
    for number in range(1, 301):
        batch = rng.choice(len(train_x), 64)
        state = step(state, train_x[batch], train_y[batch])
        if number in (1, 10, 50, 300):
            manager.save(number, args=ocp.args.StandardSave(state))

print("saved steps:", *sorted(int(path.name) for path in folder.iterdir()))

# %% [markdown]
# !!! tip "BatchNorm"
#     With a [training state that has `batch_stats`](batchnorm_dropout_trainstate.py), the
#     statistics are saved and restored with the rest of it, and nothing below changes,
#     but for `{"params": state.params, "batch_stats": state.batch_stats}`.
#
# These are the explanations of the state in memory:

# %%
from xplique.attributions import GradCAMPP, IntegratedGradients

from xplique_flax import FlaxWrapper

inputs, targets = test_x[:100], np.eye(10, dtype="float32")[test_y[:100]]


def explain(params):
    wrapped = FlaxWrapper(model, {"params": params}, input_shape=(8, 8, 1))
    explainers = {
        "Grad-CAM++": GradCAMPP(wrapped, batch_size=25),
        "Integrated Gradients": IntegratedGradients(wrapped, batch_size=1000),
    }
    return {name: np.array(e(inputs, targets)) for name, e in explainers.items()}


before = explain(state.params)
accuracy = (model.apply({"params": state.params}, test_x).argmax(-1) == test_y).mean()
print(f"Accuracy on held-out digits: {accuracy:.1%}")

# %% [markdown]
# ## Restore, wrap, explain
#
# Now the state is forgotten. What describes it is the function `create_state`:
# `jax.eval_shape` gives its structure, shapes and dtypes, and computes nothing. Orbax
# fills this description from the files.

# %%
del state

abstract = jax.eval_shape(create_state, jax.random.key(0))
print(abstract.params["Dense_0"])

with ocp.CheckpointManager(folder) as manager:
    latest = manager.latest_step()
    restored = manager.restore(latest, args=ocp.args.StandardRestore(abstract))

print("restored:", type(restored).__name__, "of step", int(restored.step))

# %%
after = explain(restored.params)
for name in before:
    print(f"{name}, equal to the bit: {np.array_equal(before[name], after[name])}")

# %% [markdown]
# The restored state can also go on learning: the optimizer's moments and the number of
# the step are part of it.
#
# ### The parameters alone
#
# To explain a model one needs neither the optimizer nor a description. Without one,
# Orbax returns nested dictionaries, of which the parameters are one entry:

# %%
with ocp.CheckpointManager(folder) as manager:
    contents = manager.restore(latest, args=ocp.args.StandardRestore())


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


print(list(contents))
print("equal parameters:", equal(contents["params"], restored.params))

# %% [markdown]
# ### One file, by flax.serialization
#
# Flax's own way is MessagePack: the parameters become bytes, and you decide where they
# go. It is handy for a small model that travels as one file.

# %%
from flax import serialization

file = folder.with_name("params.msgpack")
file.write_bytes(serialization.to_bytes(restored.params))
print(f"{file.stat().st_size / 1000:.0f} kB")

loaded = serialization.from_bytes(abstract.params, file.read_bytes())
print("equal parameters:", equal(loaded, restored.params))

# %% [markdown]
# `from_bytes` compares the names of the parameters with the description, not their
# shapes. Where a file belongs to another version of the model, the wrapper says so,
# with `input_shape` already when it is made:

# %%
import textwrap

try:
    FlaxWrapper(CNN(width=64), {"params": loaded}, input_shape=(8, 8, 1))
except ValueError as error:
    print(textwrap.fill(str(error), 80, break_long_words=False))

# %% [markdown]
# ## Watch explanations come about
#
# Checkpoints from different steps can be wrapped side by side. Each wrapper has its own
# parameters, and none of them changes another one's explanations.

# %%
with ocp.CheckpointManager(folder) as manager:
    steps = sorted(manager.all_steps())
    description = ocp.args.StandardRestore(abstract)
    states = {number: manager.restore(number, args=description) for number in steps}

maps = {number: explain(state.params) for number, state in states.items()}

# %% alt="Two digits, an 8 and a 6, each with Grad-CAM++ and Integrated Gradients at steps 1, 10, 50 and 300. Grad-CAM++ lies along the strokes from the first step on. In Integrated Gradients red and blue pixels change places between the steps, and at step 300 the main strokes are red."
figure, grid = plt.subplots(4, 5, figsize=(8, 6.4), layout="constrained")
pairs = [(image, name) for image in (1, 3) for name in before]
for line, (image, name) in zip(grid, pairs, strict=True):
    line[0].imshow(inputs[image, ..., 0])
    line[0].set_title(name, fontsize=9)
    for axes, number in zip(line[1:], steps, strict=True):
        values = maps[number][name][image, ..., 0]
        limit = np.abs(values).max()
        signed = {"cmap": "coolwarm", "vmin": -limit, "vmax": limit}
        axes.imshow(values, **(signed if values.min() < 0 else {}))
for axes in grid.flat:
    axes.axis("off")
for axes, number in zip(grid[0, 1:], steps, strict=True):
    axes.set_title(f"step {number}", fontsize=9)
plt.show()

# %% [markdown]
# The same can be put into numbers, for all hundred digits: the correlation of the maps
# with the final ones, next to the accuracy.

# %% output="markdown"
print(f"| step | accuracy | {' | '.join(before)} |")
print("| ---: | ---: | ---: | ---: |")
for number, state in states.items():
    predictions = model.apply({"params": state.params}, test_x).argmax(-1)
    cells = [str(number), f"{(predictions == test_y).mean():.1%}"]
    for name, values in maps[number].items():
        correlation = np.corrcoef(values.ravel(), before[name].ravel())[0, 1]
        cells.append(f"{correlation:.2f}")
    print(f"| {' | '.join(cells)} |")

# %% [markdown]
# Integrated Gradients changes along with what the network knows. Grad-CAM++ looks
# plausible from the first step, at which most digits are still misread: its maps owe
# much to the strokes themselves, and less to what was learned. [Sanity checks by
# randomizing the model](sanity_checks.py) turn this observation into a test.
#
# The temporary folder is not needed any more:

# %%
temporary.cleanup()

# %% [markdown]
# More on the [parameters that the wrapper takes](../guide/wrap.md), and on
# [choosing a method by metrics](choosing_with_metrics.py).
