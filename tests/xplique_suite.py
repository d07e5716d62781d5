"""Run Xplique's own tests with Flax models in the place of its Keras models.

    python tests/xplique_suite.py path/to/a/checkout/of/xplique [options of pytest]

The tests for attributions, metrics and operators are copied out of the checkout, so that it is the
installed Xplique that they test. Each Keras model that their builders make is translated to a Flax
module with the same layers, names and initial weights, and handed to the test in a `FlaxWrapper`.

With ``--keep-keras`` the tests run on their own models: the numbers to compare with.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import tensorflow as tf
import xplique

from xplique_flax import FlaxWrapper

FOLDERS = ("tests/attributions", "tests/metrics", "tests/commons")

# Functions that return one Keras model, or a list with some: of `tests/utils.py`, then of single
# test files.
BUILDERS = (
    "generate_model",
    "generate_agnostic_model",
    "generate_timeseries_model",
    "generate_regression_model",
    "generate_linear_model",
    "_generate_model",
    "_generate_conv_model",
    "_make_simple_cnn",
    "_default_tf_model_images",
    "get_concept_model",
    "get_segmentation_model",
)

# A function that returns a function around a Keras model.
DETECTION_BUILDER = "generate_object_detection_model"

# What tests hand a `Sequential` of their own body, or the index of a layer.
CONSUMERS = (
    "GuidedBackprop",
    "DeconvNet",
    "override_relu_gradient",
    "FEM",
    "GradCAM",
    "GradCAMPP",
)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: x,
    "relu": nn.relu,
    "sigmoid": nn.sigmoid,
    "softmax": nn.softmax,
}

Step = Callable[[jax.Array, bool], jax.Array]


# ------------------------------------------------------------------------------- the Flax models


class NoCounterpart(Exception):
    """Flax has no such layer."""


class Flatten(nn.Module):
    """A module, unlike ``reshape``, so that tests can ask for the layer by its name."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return inputs.reshape(inputs.shape[0], -1)


class Chain(nn.Module):
    """Flax layers, one after the other."""

    steps: tuple[Step, ...]

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        for step in self.steps:
            inputs = step(inputs, train)
        return inputs


def flax_step(layer: keras.Layer) -> Step:
    """Return what a Flax user writes for a Keras layer, submodules under the layer's name.

    Raises
    ------
    NoCounterpart
        If Flax has no such layer.
    """
    name = layer.name
    match layer:
        case keras.layers.Conv1D() | keras.layers.Conv2D():
            act, padding = ACTIVATIONS[layer.activation.__name__], layer.padding.upper()
            return lambda x, train: act(
                nn.Conv(layer.filters, layer.kernel_size, padding=padding, name=name)(x)
            )
        case keras.layers.Dense():
            act = ACTIVATIONS[layer.activation.__name__]
            return lambda x, train: act(nn.Dense(layer.units, name=name)(x))
        case keras.layers.MaxPooling2D():
            return lambda x, train: nn.max_pool(x, layer.pool_size, layer.strides)
        case keras.layers.GlobalAveragePooling1D():
            return lambda x, train: x.mean(axis=1)
        case keras.layers.Dropout():
            return lambda x, train: nn.Dropout(layer.rate, deterministic=not train, name=name)(x)
        case keras.layers.Flatten():
            return lambda x, train: Flatten(name=name)(x)
        case keras.layers.Reshape():
            return lambda x, train: x.reshape(x.shape[0], *layer.target_shape)
        case keras.layers.Activation():
            act = ACTIVATIONS[layer.activation.__name__]
            return lambda x, train: act(x)
        case keras.layers.ReLU(max_value=None, threshold=0, negative_slope=0):
            return lambda x, train: nn.relu(x)
        case keras.layers.Lambda():
            return lambda x, train: layer.function(x)
    raise NoCounterpart(str(layer))


def wrapped_twin(model: keras.Model) -> FlaxWrapper:
    """Translate a Keras model that is a chain of layers, and wrap what comes out.

    The Flax module is run once, without the wrapper, to make sure that it is a faithful twin.
    """
    layers = _computing_layers(model)
    module = Chain(tuple(flax_step(layer) for layer in layers))
    shape = model.input_shape[1:]
    inputs = np.linspace(-1.0, 1.0, 2 * int(np.prod(shape)), dtype=np.float32).reshape(2, *shape)

    variables = module.init(jax.random.key(0), jnp.asarray(inputs), train=False)
    for layer in layers:
        if layer.get_weights():
            kernel, bias = layer.get_weights()
            variables["params"][layer.name] = {"kernel": kernel, "bias": bias}
    with participation.paused():
        outputs = module.apply(variables, jnp.asarray(inputs), train=False)
        np.testing.assert_allclose(np.asarray(outputs), model(inputs), rtol=1e-4, atol=1e-5)
        wrapper = FlaxWrapper(module, variables, input_shape=shape, apply_kwargs={"train": False})
    participation.built += 1
    return wrapper


def _computing_layers(model: keras.Model) -> list[keras.Layer]:
    return [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]


class InlineSequential:
    """Stands for a ``Sequential`` that is filled layer by layer, and translated at its first use.

    A model that Flax can't express stays a Keras model.
    """

    def __init__(self) -> None:
        self._sequential = keras.Sequential()
        self._model: keras.Model | None = None

    def add(self, layer: keras.Layer) -> None:
        self._sequential.add(layer)

    def compile(self, **settings: Any) -> None:
        self._sequential.compile(**settings)

    def translate(self) -> keras.Model:
        if self._model is None:
            try:
                self._model = wrapped_twin(self._sequential)
            except NoCounterpart:
                self._model = self._sequential
        return self._model

    def __call__(self, inputs: Any) -> Any:
        return self.translate()(inputs)


# ------------------------------------------------------------------------- into the tests' modules


def translating(builder: Callable[..., Any]) -> Callable[..., Any]:
    """Let a builder of Keras models build wrapped Flax models."""

    def translated(result: Any) -> Any:
        if isinstance(result, list):
            return [translated(one) for one in result]
        if isinstance(result, keras.Model) and not isinstance(result, FlaxWrapper):
            return wrapped_twin(result)
        return result

    return lambda *args, **kwargs: translated(builder(*args, **kwargs))


def translating_inside(builder: Any) -> Callable[..., Any]:
    """Let a builder wrap its function around a Flax model."""

    def build(*args: Any, **kwargs: Any) -> Any:
        made: list[InlineSequential] = []

        def sequential() -> InlineSequential:
            made.append(InlineSequential())
            return made[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(builder.__globals__, "Sequential", sequential)
            function = builder(*args, **kwargs)
        # Now, as the function will be called inside a graph.
        for one in made:
            one.translate()
        return function

    return build


class Consumer:
    """A function or class of Xplique that tests hand a model, as a wrapped model needs it."""

    def __init__(self, target: Callable[..., Any]) -> None:
        self._target = target

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, InlineSequential):
            model = model.translate()
        # A Sequential does not count its input layer, any functional model does.
        if isinstance(kwargs.get("conv_layer"), int):
            kwargs["conv_layer"] += 1
        return self._target(model, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def put_in_flax(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Replace what one test module builds its models with."""
    replacements = {
        **dict.fromkeys(BUILDERS, translating),
        DETECTION_BUILDER: translating_inside,
        **dict.fromkeys(CONSUMERS, Consumer),
    }
    for name, replace in replacements.items():
        if hasattr(module, name):
            patch.setattr(module, name, replace(getattr(module, name)))
    patch.setattr(tf.keras.models, "Sequential", InlineSequential)


# ---------------------------------------------------------------------------------------- counting


@dataclass
class Participation:
    """Which models took part in one test."""

    built: int = 0
    calls: int = 0
    keras_models: set[str] = field(default_factory=set)
    is_paused: bool = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def note(self, layer: keras.Layer, inputs: Any) -> None:
        """Record a layer or model that is called with data, or traced into a graph."""
        if self.is_paused or isinstance(inputs, keras.KerasTensor):
            return
        if _is_ours(layer):
            self.calls += 1
        elif isinstance(layer, keras.Model):
            layers = _computing_layers(layer)
            # A clone or a part of a wrapped model is a Keras model too, of our layers.
            if layers and not any(map(_is_ours, layers)):
                self.keras_models.add(layer.name)


def _is_our_class(layer_class: type) -> bool:
    return layer_class.__module__.partition(".")[0] == FlaxWrapper.__module__.partition(".")[0]


def _is_ours(layer: keras.Layer) -> bool:
    return _is_our_class(type(layer))


def _subclasses(parent: type[Any]) -> Iterator[type[Any]]:
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


participation = Participation()


def count_calls(patch: pytest.MonkeyPatch) -> None:
    """Note each call of a Keras layer or model in `participation`."""

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        @tf.autograph.experimental.do_not_convert
        def call(self: keras.Layer, *args: Any, **kwargs: Any) -> Any:
            participation.note(self, args[0] if args else None)
            return original(self, *args, **kwargs)

        return call

    classes = [keras.Layer, *filter(_is_our_class, _subclasses(keras.Layer))]
    owners = {next(base for base in one.__mro__ if "__call__" in vars(base)) for one in classes}
    for owner in owners:
        patch.setattr(owner, "__call__", noting(vars(owner)["__call__"]))


# ------------------------------------------------------------------------------ the pytest plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep-keras", action="store_true", help="test Xplique's own Keras models")


def pytest_configure(config: pytest.Config) -> None:
    if Path(xplique.__file__).is_relative_to(config.rootpath):
        raise pytest.UsageError(f"Not the installed Xplique: {xplique.__file__}")


def pytest_report_header() -> str:
    return f"xplique {importlib.metadata.version('xplique')}: {xplique.__file__}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Iterator[None]:
    """Run one test with its models replaced, and leave a record of them in its report."""
    global participation
    participation = Participation()
    with pytest.MonkeyPatch.context() as patch:
        count_calls(patch)
        if not item.config.getoption("keep_keras"):
            put_in_flax(item.module, patch)
        try:
            return (yield)
        finally:
            item.user_properties.append(("participation", asdict(participation)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = [
        (report, dict(report.user_properties)["participation"])
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call"
    ]
    flax = [(report, record) for report, record in rows if record["calls"]]
    only_built = [report for report, record in rows if record["built"] and not record["calls"]]
    left = [(report, record) for report, record in rows if record["keras_models"]]

    write = terminalreporter.write_line
    terminalreporter.section("models that took part")
    write(f"{len(rows)} tests ran, {sum(report.passed for report, _ in rows)} passed")
    write(
        f"{len(flax)} of them ran a wrapped Flax model, "
        f"{sum(report.passed for report, _ in flax)} passed "
        f"({sum(record['built'] for _, record in rows)} models, "
        f"{sum(record['calls'] for _, record in rows)} calls of them and their layers)"
    )
    write(f"{len(only_built)} more were given one and did not run it:")
    for report in only_built:
        write(f"  {report.nodeid}")
    write(f"{len(left)} ran a Keras model:")
    for report, record in left:
        write(f"  {report.nodeid}: {', '.join(sorted(record['keras_models']))}")


# ------------------------------------------------------------------------------------ the command


def main(arguments: list[str]) -> int:
    """Copy the tests out of a checkout, and run them."""
    if not arguments or not (Path(arguments[0]) / "tests").is_dir():
        raise SystemExit(__doc__)
    checkout, *options = arguments
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Path(checkout) / "tests", Path(folder) / "tests")
        os.chdir(folder)
        if not any(option.startswith("tests") for option in options):
            options = [*options, *FOLDERS]
        fixed = ["--rootdir", folder, "-p", "no:cacheprovider"]
        return pytest.main([*fixed, *options], plugins=[sys.modules[__name__]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
