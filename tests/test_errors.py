"""Bad input: each kind has a message that names the argument, what was given, and the fix."""

import gc
import os
import re
import subprocess
import sys
from importlib import metadata

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import tensorflow as tf
from flax import nnx
from flax.training.train_state import TrainState
from xplique.attributions import FEM, DeconvNet, GradCAM, GradCAMPP, GuidedBackprop, Saliency
from xplique.metrics import ModelRandomizationMetric

from xplique_flax import FlaxWrapper
from xplique_flax.requirements import check_requirements

IMAGES = np.linspace(0, 1, 2 * 8 * 8 * 3, dtype="float32").reshape(2, 8, 8, 3)
TARGETS = np.eye(4, dtype="float32")[[0, 1]]


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, scale=1.0):
        x = nn.relu(nn.Conv(5, (3, 3))(x * scale))
        return nn.Dense(4)(x.reshape(len(x), -1))

    def features(self, x):
        return x


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=False):
        return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(4)(x))


class Structured(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        logits = nn.Dense(4)(x)
        return {
            "dict": {"logits": logits, "features": x},
            "tuple": (logits, x),
            "scalar": logits.mean(),
            "batchless": logits.mean(0),
            "integer": logits.argmax(-1),
            "complex": logits.astype(complex),
            "none": None,
        }[self.kind]


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(2, name="inner")(x)), None


class LongScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        steps = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=129)
        return nn.Dense(4)(steps(name="steps")(nn.Dense(2)(x), None)[0])


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.RNN(nn.SimpleCell(3, name="cell"), name="rnn")(x[:, None])[:, 0])


class ReluInside(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        if self.kind == "cond":
            return jax.lax.cond(x.sum() > 0, nn.relu, lambda v: v, x)
        return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, nn.relu(s[1])), (0, x))[
            1
        ]


class Branch(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        inner = nn.Dense(4, name="inner")
        if self.is_initializing():
            inner(x)
        return nn.cond(x.sum() > 0, lambda m, v: inner(v), lambda m, v: v, self, x)


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, top, bottom):
        return nn.Dense(4)(top + bottom)


class Unused(nn.Module):
    @nn.compact
    def __call__(self, x):
        nn.Dense(2, name="idle")(x)
        return nn.Dense(4)(x)


class Lookup(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(9, 4)(x).mean(1)


class Both(nn.Module):
    def __call__(self, x):
        return x * 2, x + 1


class Whole(nn.Module):
    def __call__(self, x):
        return (x > 0).astype(int)


class Awkward(nn.Module):
    @nn.compact
    def __call__(self, x):
        a, b = Both(name="both")(nn.Dense(4, name="rows")(x.reshape(-1, 3)).reshape(-1, 8))
        return nn.Dense(4)(a - b * Whole(name="whole")(b))


ROWS = np.linspace(-1, 1, 12, dtype="float32").reshape(2, 6)


def made(module, inputs, **kwargs):
    return module.init(jax.random.key(0), inputs, **kwargs)


@pytest.fixture(scope="module")
def params():
    return made(CNN(), IMAGES)


def message(error, *parts):
    text = str(error.value)
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


def raises(kind, parts, call):
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    message(error, *parts)
    return str(error.value)


CONSTRUCTION = {
    "parameters of an NNX module": (
        ValueError,
        lambda p: FlaxWrapper(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), p),
        ["`parameters` is", "an NNX module holds its own", "Leave it out", "FlaxWrapper(flax"],
    ),
    "rngs of an NNX module": (
        ValueError,
        lambda p: FlaxWrapper(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), rngs={}),
        ["`rngs` is {}", "an NNX module holds its own", "Leave it out", "when you make it"],
    ),
    "a mode of a Linen module": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p, eval_mode=True),
        ["`eval_mode` is True", "argument of its call", 'apply_kwargs={"train": False}'],
    ),
    "a mode that is no flag": (
        TypeError,
        lambda p: FlaxWrapper(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), eval_mode="eval"),
        ["`eval_mode` is 'eval'", "Accepted are True", "and False"],
    ),
    "parameters of a bound module": (
        ValueError,
        lambda p: FlaxWrapper(CNN().bind(p), p),
        ["`parameters` is", "a bound module holds its own", "Leave it out"],
    ),
    "a preprocessing that is no function": (
        TypeError,
        lambda p: FlaxWrapper(CNN(), p, preprocess=255),
        ["`preprocess` is 255", "function of JAX", "`lambda x: x / 255`"],
    ),
    "a preprocessing that fails": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p, preprocess=lambda x: x.reshape(3), input_shape=(8, 8, 3)),
        ["`preprocess` is a function that failed with", "float32 inputs of shape (2, 8, 8, 3)"],
    ),
    "a function for a module": (
        TypeError,
        lambda p: FlaxWrapper(lambda x: x, p),
        ["`flax_module`", "FlaxWrapper.from_function(function, parameters)"],
    ),
    "a module for a function": (
        TypeError,
        lambda p: FlaxWrapper.from_function(CNN(), p),
        ["`function` is of type", "a Flax module", "FlaxWrapper(flax_module, ...)"],
    ),
    "no function": (
        TypeError,
        lambda p: FlaxWrapper.from_function(3),
        ["`function` is of type builtins.int", "`function(inputs)`"],
    ),
    "a function of too much": (
        ValueError,
        lambda p: FlaxWrapper.from_function(lambda x, y: x),
        [
            "`function` is <lambda>(x, y)",
            "inputs alone",
            "'y'",
            "`parameters` are given",
            "functools.partial",
        ],
    ),
    "a function of too little": (
        ValueError,
        lambda p: FlaxWrapper.from_function(lambda x: x, p),
        ["`function` is", "parameters and inputs alone", "too many positional arguments"],
    ),
    "no training state": (
        TypeError,
        lambda p: FlaxWrapper.from_train_state(CNN(), p),
        ["`state` is of type builtins.dict", "no `params`", "TrainState"],
    ),
    "parameters of another structure": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p).with_parameters({"params": {}}),
        ["`parameters` have another structure", "with FlaxWrapper"],
    ),
    "parameters of another shape": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p).with_parameters(
            jax.tree.map(lambda leaf: np.zeros((*leaf.shape, 1), "float32"), p)
        ),
        ["`parameters`: params.", "has the shape", "and had", "with FlaxWrapper"],
    ),
    "parameters that are no arrays": (
        TypeError,
        lambda p: FlaxWrapper(CNN(), p).with_parameters(jax.tree.map(lambda leaf: "x", p)),
        ["`parameters`: params.", "is of type builtins.str", "with FlaxWrapper"],
    ),
    "another constant": (
        ValueError,
        lambda p: FlaxWrapper.from_function(
            lambda q, x: x / q["t"], {"t": 1.0, "w": np.ones(3, "float32")}
        ).with_parameters({"t": 2.0, "w": np.ones(3, "float32")}),
        ["`parameters`: params.t is 2.0, and was 1.0", "a constant", "Make an array of it"],
    ),
    "a class for a module": (
        TypeError,
        lambda p: FlaxWrapper(CNN, p),
        ["`flax_module`", "CNN (a class)", "flax.linen.Module", "Make an instance"],
    ),
    "a plain function for a module": (
        TypeError,
        lambda p: FlaxWrapper(lambda x: x, p),
        ["`flax_module` is of type builtins.function", "flax.linen.Module"],
    ),
    "arguments in the wrong order": (
        TypeError,
        lambda p: FlaxWrapper(p, CNN()),
        ["`flax_module` is of type builtins.dict", "FlaxWrapper(flax_module, parameters)"],
    ),
    "a training state for a module": (
        TypeError,
        lambda p: FlaxWrapper(
            TrainState.create(apply_fn=None, params=p["params"], tx=optax.sgd(0.1))
        ),
        ["`flax_module`", "TrainState", "the training state was made for", "from_train_state"],
    ),
    "a training state for the parameters": (
        TypeError,
        lambda p: FlaxWrapper(
            CNN(), TrainState.create(apply_fn=None, params=p["params"], tx=optax.sgd(0.1))
        ),
        ["`parameters` is of type", "TrainState", '`{"params": state.params}`'],
    ),
    "params twice": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), {"params": p}),
        ["`parameters` has 'params' twice", "Pass `parameters['params']`"],
    ),
    "an entry that is None": (
        TypeError,
        lambda p: FlaxWrapper(CNN(), {"params": {"kernel": None}}),
        ["`parameters`", "['params']['kernel'] is of type builtins.NoneType"],
    ),
    "a random key among the parameters": (
        TypeError,
        lambda p: FlaxWrapper(CNN(), {**p, "rngs": {"key": jax.random.key(0)}}),
        ["`parameters`", "['rngs']['key']", "dtype key<fry>", "numeric arrays"],
    ),
    "rngs that are no keys": (
        TypeError,
        lambda p: FlaxWrapper(CNN(), p, rngs={"dropout": 3}),
        ["`rngs` is {'dropout': 3}", '`{"dropout": jax.random.key(0)}`'],
    ),
    "rngs that are data": (
        TypeError,
        lambda p: FlaxWrapper(CNN(), p, rngs=IMAGES),
        ["`rngs` is array(", "of type numpy.ndarray", '`{"dropout": jax.random.key(0)}`'],
    ),
    "an input_shape that is data": (
        TypeError,
        lambda p: FlaxWrapper(CNN(), p, input_shape=IMAGES),
        ["`input_shape` is of type numpy.ndarray", "inputs.shape[1:] gives it"],
    ),
    "no parameters": (
        TypeError,
        lambda p: FlaxWrapper(CNN()),
        ["`parameters` is of type builtins.NoneType", "`flax_module.init()`"],
    ),
    "the content of params": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p["params"]),
        ["`parameters` has the keys ['Conv_0', 'Dense_0']", "pass `{'params': parameters}`"],
    ),
    "no params": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), {"batch_stats": p["params"]}),
        ["`parameters` has the keys ['batch_stats']", "Add the collection 'params'"],
    ),
    "an entry that is no array": (
        TypeError,
        lambda p: FlaxWrapper(CNN(), {"params": {"kernel": "text"}}),
        ["`parameters`", "['params']['kernel'] is of type builtins.str", "np.asarray"],
    ),
    "parameters of another module": (
        ValueError,
        lambda p: FlaxWrapper(
            CNN(), {"params": {"Dense_0": p["params"]["Dense_0"]}}, input_shape=(8, 8, 3)
        ),
        ["`parameters` do not fit `flax_module`", "Conv_0", "flax_module.init()"],
    ),
    "parameters for another input": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p, input_shape=(8, 8, 1)),
        ["(N, 8, 8, 1)", "(3, 3, 3, 5)", "`inputs`", "they were made for"],
    ),
    "channels first": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p, input_shape=(3, 8, 8)),
        [
            "(N, 3, 8, 8)",
            "channels first",
            "samples of shape (8, 8, 3) do fit",
            "np.moveaxis(inputs, 1, -1)",
        ],
    ),
    "unknown apply_kwargs": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p, apply_kwargs={"train": False}),
        ["`apply_kwargs` is {'train': False}", "'train'", "['scale']", "CNN.__call__"],
    ),
    "apply_kwargs of apply": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p, apply_kwargs={"mutable": ["batch_stats"]}),
        ["`apply_kwargs` has 'mutable'", "leave it out"],
    ),
    "apply_kwargs that is no dict": (
        TypeError,
        lambda p: FlaxWrapper(CNN(), p, apply_kwargs=["train"]),
        ["`apply_kwargs` is ['train']", '`{"train": False}`'],
    ),
    "an unknown method": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p, method="encode"),
        ["`method` is 'encode'", "no method of CNN", "['__call__', 'features']"],
    ),
    "an output of another kind": (
        TypeError,
        lambda p: FlaxWrapper(CNN(), p, output=1.5),
        ["`output` is 1.5", "float", '`lambda out: out["logits"]`'],
    ),
    "an input_shape with None": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p, input_shape=(None, 8, 8, 3)),
        ["`input_shape` is (None, 8, 8, 3)", "without the batch", "Pass (8, 8, 3)"],
    ),
    "an input_shape with None inside": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p, input_shape=(8, None, 3)),
        ["`input_shape` is (8, None, 3)", "positive integers"],
    ),
    "an input_shape that is text": (
        TypeError,
        lambda p: FlaxWrapper(CNN(), p, input_shape="8x8"),
        ["`input_shape` is of type builtins.str", "positive integers", "inputs.shape[1:]"],
    ),
    "an input_shape with a batch": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p, input_shape=(2, 8, 8, 3)),
        ["(N, 2, 8, 8, 3)", "Samples of shape (8, 8, 3) do fit", "batch dimension"],
    ),
    "an input_shape with a batch of one": (
        ValueError,
        lambda p: FlaxWrapper(CNN(), p, input_shape=(1, 8, 8, 3)),
        ["`input_shape` is (1, 8, 8, 3)", "batch dimension", "Pass (8, 8, 3)"],
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction_is_refused(case, params):
    kind, call, parts = CONSTRUCTION[case]
    raises(kind, parts, lambda: call(params))


def test_batch_of_one_in_the_shape_of_a_fully_convolutional_model():
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.Conv(5, (3, 3))(x).mean((1, 2)))

    parameters = made(Pooled(), IMAGES)
    raises(
        ValueError,
        ["`input_shape` is (1, 8, 8, 3)", "batch dimension", "Pass (8, 8, 3)"],
        lambda: FlaxWrapper(Pooled(), parameters, input_shape=(1, 8, 8, 3)),
    )


class Merging(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5)(nn.Dense(4)(x))


class Branching(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x if x.sum() > 0 else -x)


class TestModes:
    def test_flag_that_flax_asks_for(self):
        parameters = {"params": {"Dense_0": made(Structured("scalar"), ROWS)["params"]["Dense_0"]}}
        raises(
            ValueError,
            ["`apply_kwargs`: a flag", "deterministic", "modules that need it"],
            lambda: FlaxWrapper(Merging(), parameters)(ROWS),
        )

    def test_python_that_depends_on_values(self):
        parameters = {"params": {"Dense_0": made(Structured("scalar"), ROWS)["params"]["Dense_0"]}}
        raises(
            ValueError,
            ["`flax_module`", "not on their values", "jnp.where or jax.lax.cond"],
            lambda: FlaxWrapper(Branching(), parameters)(ROWS),
        )

    def test_missing_flag(self):
        parameters = made(Training(), ROWS, train=False)
        raises(
            ValueError,
            ["`apply_kwargs` is {}", "'train'", '`apply_kwargs={"train": False}`'],
            lambda: FlaxWrapper(Training(), parameters),
        )

    def test_second_input(self):
        parameters = TwoInputs().init(jax.random.key(0), ROWS, ROWS)
        error = raises(
            ValueError,
            ["`apply_kwargs` is {}", "'bottom'", "second array", "take one", "`method`"],
            lambda: FlaxWrapper(TwoInputs(), parameters),
        )
        assert "False" not in error

    @pytest.mark.parametrize("shape", [None, (6,)])
    def test_training_mode(self, shape):
        parameters = made(Training(), ROWS, train=False)
        raises(
            ValueError,
            ["`apply_kwargs`", "updates the module's state", "the flag 'train'", "batch_stats"],
            lambda: FlaxWrapper(
                Training(), parameters, apply_kwargs={"train": True}, input_shape=shape
            )(ROWS),
        )

    @pytest.mark.parametrize("shape", [None, (6,)])
    def test_missing_random_stream(self, shape):
        parameters = made(Dropped(), ROWS, deterministic=True)
        raises(
            ValueError,
            ["`rngs`", "random stream", "dropout", '`apply_kwargs={"deterministic": True}`'],
            lambda: FlaxWrapper(Dropped(), parameters, input_shape=shape)(ROWS),
        )

    def test_training_argument_of_keras(self, params):
        raises(
            ValueError,
            ["`training` is set", '`apply_kwargs={"train": True}`'],
            lambda: FlaxWrapper(CNN(), params)(IMAGES, training=True),
        )

    def test_training_argument_of_a_sub_model(self, params):
        wrapped = FlaxWrapper(CNN(), params, input_shape=IMAGES.shape[1:])
        features = tf.keras.Model(wrapped.input, wrapped.layers[1].output)
        raises(ValueError, ["`training` is set"], lambda: features(IMAGES, training=True))

    def test_tokens(self):
        parameters = made(Lookup(), np.zeros((2, 6), int))
        raises(
            ValueError,
            ["integer", "float32", "`inputs.astype(int)`"],
            lambda: FlaxWrapper(Lookup(), parameters)(ROWS),
        )


OUTPUTS = {
    "a dict": ("dict", None, ["`output`", "a dict with the keys ['features', 'logits']"]),
    "a tuple": ("tuple", None, ["`output`", "a tuple of 2"]),
    "nothing": ("none", None, ["`output`", "NoneType"]),
    "a scalar": ("scalar", None, ["`output`", "shape ()", "without a batch dimension"]),
    "no batch": ("batchless", None, ["`output`", "shape (4,)", "without a batch dimension"]),
    "integers": ("integer", None, ["`output`", "int32", "no gradient"]),
    "complex numbers": ("complex", None, ["`output`", "complex64", "no gradient"]),
    "an unknown key": ("dict", "probs", ["`output` is 'probs'", "['features', 'logits']"]),
    "an unknown index": ("tuple", 2, ["`output` is 2", "a tuple of 2"]),
    "a key of an array": ("scalar", "logits", ["`output` is 'logits'", "one array"]),
    "a function that fails": (
        "dict",
        lambda out: out["probs"],
        ["`output` is a function that failed with KeyError", "['features', 'logits']"],
    ),
    "a function that keeps the dict": (
        "dict",
        lambda out: out,
        ["`output`", "a dict with the keys"],
    ),
}


@pytest.mark.parametrize("shape", [None, (6,)], ids=["without a shape", "with a shape"])
@pytest.mark.parametrize("case", OUTPUTS)
def test_output_is_refused(case, shape):
    kind, output, parts = OUTPUTS[case]
    parameters = made(Structured(kind), ROWS)
    raises(
        ValueError,
        parts,
        lambda: FlaxWrapper(Structured(kind), parameters, output=output, input_shape=shape)(ROWS),
    )


INPUTS = {
    "text": (TypeError, "text", ["`inputs`", "string", "real numbers"]),
    "an object": (TypeError, object(), ["`inputs` is of type object", "no array"]),
    "a dict": (
        TypeError,
        {"x": np.ones((2, 2))},
        ["`inputs` is of type dict", "TensorFlow says: ", "[[1., 1.], [1., 1.]]"],
    ),
    "a ragged list": (TypeError, [[1.0], [1.0, 2.0]], ["`inputs` is of type list", "no array"]),
    "complex numbers": (TypeError, IMAGES.astype(complex), ["`inputs`", "complex128"]),
    "a number": (ValueError, 1.0, ["`inputs` has no dimension", "(N, ...)"]),
    "another size": (ValueError, IMAGES[:, :4], ["(2, 4, 8, 3)", "(8, 8, 3)"]),
    "channels first": (
        ValueError,
        np.moveaxis(IMAGES, -1, 1),
        ["(2, 3, 8, 8)", "channels first", "np.moveaxis(inputs, 1, -1)"],
    ),
}


@pytest.mark.parametrize("shape", [None, (8, 8, 3)], ids=["without a shape", "with a shape"])
@pytest.mark.parametrize("case", INPUTS)
def test_inputs_are_refused(case, shape, params):
    kind, inputs, parts = INPUTS[case]
    wrapped = FlaxWrapper(CNN(), params, input_shape=shape)
    if shape is None:
        parts = [part for part in parts if part != "(8, 8, 3)"]
        parts = [part.replace("(2, ", "(N, ") for part in parts]
    raises(kind, parts, lambda: wrapped(inputs))


def test_one_sample_without_its_batch(params):
    wrapped = FlaxWrapper(CNN(), params, input_shape=(8, 8, 3))
    raises(ValueError, ["(8, 8, 3)", "inputs[None]"], lambda: wrapped(IMAGES[0]))


def test_message_arrives_through_xplique(params):
    explainer = Saliency(FlaxWrapper(CNN(), params, input_shape=(8, 8, 3)))
    with pytest.raises(ValueError, match="channels first") as error:
        explainer(np.moveaxis(IMAGES, -1, 1), TARGETS)
    message(error, "`inputs` has the shape (2, 3, 8, 8)", "np.moveaxis(inputs, 1, -1)")


class TestLayers:
    @pytest.fixture
    def wrapped(self):
        return FlaxWrapper(CNN(), made(CNN(), IMAGES), input_shape=(8, 8, 3))

    def test_unknown_name(self, wrapped):
        parts = ["`layer` is 'Conv_1'", "Did you mean 'Conv_0'?", "'Dense_0'"]
        raises(ValueError, parts, lambda: wrapped.get_layer("Conv_1"))
        raises(ValueError, parts, lambda: wrapped.truncate("Conv_1"))
        raises(ValueError, parts, lambda: GradCAM(wrapped, conv_layer="Conv_1"))

    def test_index_out_of_range(self, wrapped):
        count = len(wrapped.layers)
        for index in (count, -count - 1):
            raises(
                ValueError,
                [f"`layer` is {index}", f"{count} layers", f"from {-count} to {count - 1}"],
                lambda index=index: wrapped.get_layer(index=index),
            )

    def test_layer_that_is_no_name(self, wrapped):
        layer = wrapped.layers[1]
        raises(
            TypeError,
            ["`layer` is of type", "the name or the index"],
            lambda: wrapped.truncate(layer),
        )

    @pytest.mark.parametrize(
        ("name", "part"), [("rows", "(None, 4)"), ("both", "has 2 outputs"), ("whole", "int32")]
    )
    def test_truncate_where_no_model_can_end(self, name, part):
        wrapped = FlaxWrapper(Awkward(), made(Awkward(), ROWS), input_shape=(6,))
        raises(
            ValueError,
            [f"`layer` is '{name}'", part, "Accepted are layers"],
            lambda: wrapped.truncate(name),
        )

    def test_neither_name_nor_index(self, wrapped):
        with pytest.raises(ValueError, match="either a layer name or layer index"):
            wrapped.get_layer()

    def test_truncate_at_the_input(self, wrapped):
        raises(ValueError, ["'inputs'", "computes nothing"], lambda: wrapped.truncate("inputs"))

    def test_unused_module(self):
        wrapped = FlaxWrapper(Unused(), made(Unused(), ROWS), input_shape=(6,))
        raises(ValueError, ["'idle'", "does not depend on"], lambda: wrapped.get_layer("idle"))

    def test_module_inside_scan(self):
        wrapped = FlaxWrapper(Recurrent(), made(Recurrent(), ROWS), input_shape=(6,))
        for name in ("cell", "cell.i"):
            raises(
                ValueError,
                [f"`layer` is '{name}'", "inside a `scan`", "'Dense_0'"],
                lambda name=name: wrapped.get_layer(name),
            )

    def test_module_inside_cond(self):
        wrapped = FlaxWrapper(Branch(), made(Branch(), ROWS), input_shape=(6,))
        parts = ["inside a `cond`", "one of the branches", "'first'", "jnp.where"]
        raises(ValueError, parts, lambda: wrapped.get_layer("inner"))

    @pytest.mark.parametrize("explainer", [GuidedBackprop, DeconvNet])
    @pytest.mark.parametrize(
        ("module", "where"),
        [
            (LongScan(), "`scan`"),
            (ReluInside("cond"), "`cond`"),
            (ReluInside("while"), "`while`"),
        ],
        ids=["scan", "cond", "while"],
    )
    def test_relu_that_cannot_be_replaced(self, explainer, module, where):
        wrapped = FlaxWrapper(module, made(module, ROWS), input_shape=(6,))
        parts = ["has a ReLU inside a " + where, "Guided Backprop", "Saliency"]
        raises(ValueError, parts, lambda: explainer(wrapped))

    def test_no_convolution(self):
        wrapped = FlaxWrapper(Unused(), made(Unused(), ROWS), input_shape=(6,))
        for explainer in (GradCAM, GradCAMPP, FEM):
            raises(
                ValueError,
                ["no convolution", "`conv_layer`"],
                lambda explainer=explainer: explainer(wrapped),
            )


class TestWithoutInputShape:
    PARTS = ("`input_shape` was not given", "input_shape=inputs.shape[1:]")

    @pytest.mark.parametrize(
        "look",
        [
            GradCAM,
            GradCAMPP,
            FEM,
            GuidedBackprop,
            DeconvNet,
            lambda w: GradCAM(w, conv_layer="Conv_0"),
            lambda w: GradCAM(w, conv_layer=-1)(IMAGES, TARGETS),
            lambda w: FEM(w, conv_layer=-1)(IMAGES, TARGETS),
            lambda w: w.get_layer("Conv_0"),
            lambda w: w.get_layer(index=1),
            lambda w: w.truncate("Conv_0"),
            lambda w: w.summary(),
            lambda w: w.count_params(),
            lambda w: w.get_weights(),
            lambda w: w.set_weights([]),
            lambda w: tf.keras.models.clone_model(w),
            lambda w: w.layers,
            lambda w: tf.keras.Model(w.inputs, w.outputs)(tf.zeros(2)),
            lambda w: ModelRandomizationMetric(w, IMAGES, TARGETS)(Saliency(w)),
        ],
    )
    def test_looking_inside(self, look, params):
        wrapped = FlaxWrapper(CNN(), params)
        with pytest.raises(ValueError, match="input_shape") as error:
            look(wrapped)
        message(error, *self.PARTS)


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda w: w.fit(IMAGES, TARGETS), "Optax"),
        (lambda w: w.train_on_batch(IMAGES, TARGETS), "Optax"),
        (lambda w: w.save("model.keras"), "Orbax"),
        (lambda w: w.save_weights("model.weights.h5"), "Orbax"),
        (lambda w: w.load_weights("model.weights.h5"), "Orbax"),
        (lambda w: w.to_json(), "Orbax"),
        (lambda w: w.export("model"), "jax.export"),
    ],
)
def test_what_is_done_elsewhere(call, where, params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotImplementedError) as error:
        call(FlaxWrapper(CNN(), params, input_shape=(8, 8, 3)))
    message(error, "is not available", where)
    assert not list(tmp_path.iterdir())


def test_saving_through_keras(params, tmp_path):
    wrapped = FlaxWrapper(CNN(), params, input_shape=(8, 8, 3))
    with pytest.raises(NotImplementedError) as error:
        tf.keras.models.save_model(wrapped, tmp_path / "model.keras")
    message(error, "is not available", "Orbax")


@pytest.mark.parametrize(
    "save",
    [
        lambda model: tf.saved_model.save(model, "model"),
        lambda model: tf.train.Checkpoint(model=model).save("model"),
        lambda model: keras.Model(model.inputs, model.layers[1].output).export("sub"),
        lambda model: keras.Model(model.inputs, model.layers[1].output).save_weights(
            "sub.weights.h5"
        ),
    ],
)
def test_saving_without_the_parameters(save, params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotImplementedError) as error:
        save(FlaxWrapper(CNN(), params, input_shape=(8, 8, 3)))
    message(error, "can't be saved", "Orbax", "jax.export")


REFUSED_ENVIRONMENTS = [
    ({"KERAS_BACKEND": "jax"}, None, ["backend to be TensorFlow", "'jax'", "KERAS_BACKEND"]),
    ({"TF_USE_LEGACY_KERAS": "1"}, None, ["Keras 3", "TF_USE_LEGACY_KERAS=1", "Unset it"]),
    ({}, ("jax", None), ["jax 0.10 or later", "not installed", "pip install"]),
    ({}, ("jax", "0.4.38"), ["jax 0.10 or later", "jax 0.4.38 is installed", "Upgrade"]),
    ({}, ("flax", None), ["flax 0.12.2 or later", "not installed", "pip install"]),
    ({}, ("flax", "0.12.1"), ["flax 0.12.2 or later", "flax 0.12.1 is installed", "Upgrade"]),
]


@pytest.mark.parametrize(("environment", "installed", "parts"), REFUSED_ENVIRONMENTS)
def test_environment_is_refused(environment, installed, parts, monkeypatch):
    def version(package, known=metadata.version):
        if installed is None or package != installed[0]:
            return known(package)
        if installed[1] is None:
            raise metadata.PackageNotFoundError(package)
        return installed[1]

    monkeypatch.setattr(metadata, "version", version)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    raises(ImportError, ["xplique_flax needs", *parts], check_requirements)


def test_backend_that_is_set_in_the_file_of_keras(monkeypatch):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    check_requirements()
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    raises(ImportError, ["backend to be TensorFlow", "'torch'"], check_requirements)


@pytest.mark.parametrize(("environment", "installed", "parts"), REFUSED_ENVIRONMENTS[:2])
def test_import_is_refused(environment, installed, parts):
    run = subprocess.run(
        [sys.executable, "-c", "import xplique_flax"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1
    assert last.startswith("ImportError: xplique_flax needs")
    assert all(part in last for part in parts)


def test_deleted_wrapper_in_a_graph(params):
    wrapped = FlaxWrapper(CNN(), params)
    model = [wrapped]
    concrete = tf.function(lambda x: model[0](x)).get_concrete_function(tf.constant(IMAGES))
    np.testing.assert_allclose(concrete(tf.constant(IMAGES)), wrapped(IMAGES), rtol=1e-6)
    model.clear()
    del wrapped
    gc.collect()
    with pytest.raises(tf.errors.OpError) as error:
        concrete(tf.constant(IMAGES))
    message(error, "was deleted", "Keep a reference")


def test_parameters_are_set_outside_of_graphs(params):
    wrapped = FlaxWrapper(CNN(), params, input_shape=(8, 8, 3))
    variable = wrapped.get_layer("Dense_0").weights[0]

    @tf.function
    def assign():
        variable.assign(jnp.zeros(variable.shape))

    raises_outside = pytest.raises(NotImplementedError)
    with raises_outside as error:
        assign()
    message(error, "outside of it")


@pytest.mark.parametrize(
    ("devices", "error"),
    [
        (jax.devices()[0], TypeError),
        ("all", TypeError),
        ([0, 1], TypeError),
        ([], ValueError),
        (jax.devices()[:1] * 2, ValueError),
    ],
)
def test_devices_that_are_none(devices, error):
    accepted = r"Accepted is a list of different devices of this process.*jax\.local_devices\(\)"
    with pytest.raises(error, match=rf"(?s)`devices` is {re.escape(repr(devices))}\. {accepted}"):
        FlaxWrapper(nn.Dense(3), {}, devices=devices)
    with pytest.raises(error, match=accepted):
        FlaxWrapper.from_function(lambda x: x, devices=devices)
