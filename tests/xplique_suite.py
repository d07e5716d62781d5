"""Run Xplique's own tests with Flax models in the place of its Keras models.

    python tests/xplique_suite.py path/to/a/checkout/of/xplique [options of pytest]

The tests are copied out of the checkout, so that it is the installed Xplique that they test. In
the copy, each Keras model is handed to `in_flax` as soon as it is complete. It becomes a Flax
module with the same graph of layers, their names and their weights, in a `FlaxWrapper`.

With ``--keep-keras`` the tests run on their own models: the numbers to compare with. Among the
options may be folders, such as ``tests/concepts``: all of them take half an hour.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import tensorflow as tf
import xplique
from jax.ad_checkpoint import checkpoint_name

from xplique_flax import FlaxWrapper

# What the tests make Keras models with, other than their own subclasses of `keras.Model`.
MODELS = {"Sequential", "Model", "ResNet50"}

# What tests say of a model that is something else for its twin: by reason, the file, the old text
# and the new one.
EDITS: dict[str, list[tuple[str, str, str]]] = {
    "a Sequential does not count its input layer, and a functional model does": [
        ("attributions/test_grad_cam.py", "conv_layer=0", "conv_layer=1"),
        ("attributions/test_grad_cam_pp.py", "conv_layer=0", "conv_layer=1"),
        ("attributions/test_fem.py", "conv_layer=0", "conv_layer=1"),
        ("concepts/test_tcav.py", "Tcav(model, 1)", "Tcav(model, 2)"),
        ("features_visualizations/test_objectives.py", "model.layers[1]", "model.layers[2]"),
    ],
    "an activation is a layer after the one that has it in Keras": [
        ("concepts/test_craft_tf.py", '["conv2d"]', '["relu"]'),
        ("concepts/test_craft_tf.py", "model.layers[0]", "model.layers[2]"),
        ("concepts/test_latent_extractor_tf.py", "True, -5, 4]", "True, -6, 5]"),
        ("concepts/test_holistic_craft_classification_tf.py", "layer=-3", "layer=-4"),
    ],
    "Flax has a ReLU that saturates at 6, and none that does at 3": [
        ("commons/test_model_override.py", "max_value=3", "max_value=6"),
        ("commons/test_model_override.py", "[6.0, 0.0, 0.0, 6.0]", "[10.0, 0.0, 0.0, 12.0]"),
    ],
    "a layer alone is no model: nothing tells the shape of its inputs": [
        (
            "utils_functions/test_box_model_wrapper.py",
            "tf.keras.layers.Lambda(lambda value: value)",
            "tf.keras.Sequential([tf.keras.layers.Lambda(lambda x: x, input_shape=(3, 7))])",
        ),
    ],
}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: x,
    "relu": nn.relu,
    "sigmoid": nn.sigmoid,
    "softmax": nn.softmax,
}

# What the functions in the tests' `Lambda` layers use of TensorFlow.
TF_IN_JAX = SimpleNamespace(cast=jnp.astype, float32=jnp.float32)

# Where Flax has the weights of a batch normalization.
FLAX_WEIGHTS = {
    "gamma": ("params", "scale"),
    "beta": ("params", "bias"),
    "moving_mean": ("batch_stats", "mean"),
    "moving_variance": ("batch_stats", "var"),
}

Step = Callable[[Any, bool], jax.Array]


# ------------------------------------------------------------------------------- the Flax models


class NoCounterpart(Exception):
    """Flax has no such layer or model."""


class Flatten(nn.Module):
    """A module, unlike ``reshape``, so that tests can ask for the layer by its name."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return inputs.reshape(inputs.shape[0], -1)


class Twin(nn.Module):
    """A function of the inputs and of ``train`` that makes submodules."""

    function: Step

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        return self.function(inputs, train)


def flax_step(layer: keras.Operation) -> Step:
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
                nn.Conv(layer.filters, layer.kernel_size, layer.strides, padding, name=name)(x)
            )
        case keras.layers.Dense():
            act = ACTIVATIONS[layer.activation.__name__]
            return lambda x, train: act(nn.Dense(layer.units, name=name)(x))
        case keras.layers.BatchNormalization():
            return lambda x, train: nn.BatchNorm(not train, epsilon=layer.epsilon, name=name)(x)
        case keras.layers.MaxPooling2D():
            return lambda x, train: nn.max_pool(x, layer.pool_size, layer.strides)
        case keras.layers.GlobalAveragePooling1D() | keras.layers.GlobalAveragePooling2D():
            return lambda x, train: x.mean(axis=tuple(range(1, x.ndim - 1)))
        case keras.layers.ZeroPadding2D():
            return lambda x, train: jnp.pad(x, ((0, 0), *layer.padding, (0, 0)))
        case keras.layers.Add():
            return lambda summands, train: functools.reduce(jnp.add, summands)
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
        case keras.layers.ReLU(max_value=6, threshold=0, negative_slope=0):
            return lambda x, train: nn.relu6(x)
        case keras.layers.Lambda() if not layer.arguments:
            function = in_jax(layer.function)
            return lambda x, train: checkpoint_name(function(x), name)
        case keras.layers.Lambda():
            raise NoCounterpart("Flax has no Lambda with arguments")
    raise NoCounterpart(f"Flax has no {layer}")


def in_jax(function: FunctionType) -> FunctionType:
    """Return a test's function with JAX in the place of TensorFlow."""
    namespace = {**function.__globals__, "tf": TF_IN_JAX}
    return FunctionType(function.__code__, namespace, closure=function.__closure__)


def wrapped_twin(model: keras.Model) -> FlaxWrapper:
    """Translate a functional or sequential Keras model, and wrap what comes out.

    The Flax module is run once, without the wrapper, to make sure that it is a faithful twin.
    """
    graph = graph_of(model)
    layers = _computing_layers(model)
    steps = {layer.name: flax_step(layer) for layer in layers}
    # Keras has noted `training` and `mask`, too, of the calls of its layers.
    module = Twin(
        lambda inputs, train: graph._run_through_graph(
            inputs, lambda layer: lambda x, **_: steps[layer.name](x, train)
        )
    )
    variables: dict[str, dict[str, dict[str, np.ndarray]]] = {"params": {}}
    for layer in layers:
        for weight in layer.weights:
            collection, name = FLAX_WEIGHTS.get(weight.name, ("params", weight.name))
            of_layer = variables.setdefault(collection, {}).setdefault(layer.name, {})
            of_layer[name] = weight.numpy()

    shape = model.input_shape[1:]
    inputs = np.linspace(-1.0, 1.0, 2 * int(np.prod(shape)), dtype=np.float32).reshape(2, *shape)
    with participation.paused():
        outputs = module.apply(variables, jnp.asarray(inputs), train=False)
        np.testing.assert_allclose(np.asarray(outputs), model(inputs), rtol=1e-4, atol=1e-5)
        return FlaxWrapper(module, variables, input_shape=shape, apply_kwargs={"train": False})


def in_flax(model: Any) -> Any:
    """Return the wrapped twin of a Keras model, or the model itself if it has none."""
    if graph_of(model) is None or any(map(_is_ours, model.layers)):
        return model
    try:
        twin = wrapped_twin(model)
    except NoCounterpart as error:
        participation.kept[model.name] = str(error)
        return model
    participation.built += 1
    # If it ran before, it was to be trained.
    participation.keras_models.pop(model.name, None)
    return twin


def graph_of(model: keras.Model) -> Any:
    """Return the functional model that a Keras model is, or has inside."""
    functional = getattr(model, "_functional", model)
    return functional if hasattr(functional, "_run_through_graph") else None


def _computing_layers(model: keras.Model) -> list[keras.Layer]:
    return [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]


# ------------------------------------------------------------------------- into the tests' sources


class Translation(ast.NodeTransformer):
    """Hands each Keras model that a test makes to `in_flax`, before anything else uses it."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        # What has a name may not be complete yet.
        return node if _makes_model(node.value) else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return _call_of_in_flax(node) if _makes_model(node) else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(node, name, list(self._translated(block)))
        return node

    @staticmethod
    def _translated(block: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
        incomplete: set[str] = set()
        for statement in block:
            names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            used = (names - {_receiver(statement)}) & incomplete
            for name in sorted(used):
                value = _call_of_in_flax(ast.Name(name, ast.Load()))
                yield ast.Assign([ast.Name(name, ast.Store())], value)
            incomplete -= used
            match statement:
                case ast.Assign(targets=[ast.Name(name)], value=value) if _makes_model(value):
                    incomplete.add(name)
            yield statement


def _makes_model(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Name(name) | ast.Attribute(attr=name)):
            return name in MODELS
    return False


def _receiver(statement: ast.stmt) -> str | None:
    """Return what a statement only calls a method of, such as ``add``, ``compile`` or ``fit``."""
    node: Any = statement.value if isinstance(statement, ast.Expr) else None
    while isinstance(node, ast.Call | ast.Attribute):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _call_of_in_flax(argument: ast.expr) -> ast.Call:
    return ast.Call(ast.Name("in_flax", ast.Load()), [argument], [])


def translate(tests: Path) -> None:
    """Let the tests of a folder make Flax models."""
    for reason, edits in EDITS.items():
        for name, old, new in edits:
            source = (tests / name).read_text()
            if old not in source:
                raise pytest.UsageError(f"{name} has no {old!r} to be {new!r}, as {reason}")
            (tests / name).write_text(source.replace(old, new))
    for path in tests.rglob("*.py"):
        tree = Translation().visit(ast.parse(path.read_text()))
        path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    builtins.in_flax = in_flax


# ---------------------------------------------------------------------------------------- counting


@dataclass
class Participation:
    """Which models took part in one test, with the reasons for the Keras ones."""

    built: int = 0
    calls: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    keras_models: dict[str, str] = field(default_factory=dict)
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
        elif isinstance(layer, keras.Model) and not _is_from("xplique", type(layer)):
            layers = _computing_layers(layer)
            if graph_of(layer) is None:
                self.keras_models[layer.name] = "a subclass of keras.Model"
            elif layers and not any(map(_is_ours, layers)):
                # A clone or a part of a wrapped model is a Keras model too, of our layers.
                why = self.kept.get(layer.name, "a clone or part of one")
                self.keras_models[layer.name] = why


def _is_from(package: str, layer_class: type) -> bool:
    return layer_class.__module__.partition(".")[0] == package


def _is_our_class(layer_class: type) -> bool:
    return _is_from(FlaxWrapper.__module__.partition(".")[0], layer_class)


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
    if not config.getoption("keep_keras"):
        translate(config.rootpath / "tests")


def pytest_report_header() -> str:
    return f"xplique {importlib.metadata.version('xplique')}: {xplique.__file__}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """Skip the files for PyTorch where there is none, as some of them do themselves."""
    report = yield
    cause = report.call.excinfo and report.call.excinfo.value.__cause__
    if isinstance(cause, ModuleNotFoundError) and cause.name == "torch":
        report.outcome = "skipped"
        report.longrepr = (report.nodeid, 1, f"Skipped: {cause}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Function) -> Iterator[None]:
    """Leave a record of the models that take part in a test in its reports."""
    global participation
    participation = Participation()
    item.user_properties.append(("participation", participation))
    with pytest.MonkeyPatch.context() as patch:
        count_calls(patch)
        return (yield)


# The columns of the summary, with what to say of the tests that it lists.
COLUMNS = {
    "ran": "",
    "passed": "",
    "Flax": "",
    "Flax passed": "",
    "given": "were given a wrapped Flax model, and did not run it",
    "Keras": "ran a Keras model",
    "none": "make no Keras model",
    "skipped": "were skipped; a file that can not be imported counts as one",
}


def _columns(report: Any) -> Iterator[tuple[str, str]]:
    """Yield the columns that a test counts in, with what to list of it there."""
    file = report.nodeid.partition("::")[0]
    if report.skipped:
        yield "skipped", f"{file}: {report.longrepr[2].removeprefix('Skipped: ')}"
        return
    record: Participation = dict(report.user_properties)["participation"]
    reasons = {*record.keras_models.values(), *record.kept.values()}
    yield "ran", ""
    if report.passed:
        yield "passed", ""
    if record.calls:
        yield "Flax", ""
        if report.passed:
            yield "Flax passed", ""
    elif record.built:
        yield "given", report.nodeid
    if reasons:
        yield "Keras", f"{report.nodeid}: {', '.join(sorted(reasons))}"
    if not (reasons or record.built or record.calls):
        yield "none", file


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Count the tests by folders, and list those that ran no Flax model."""
    table: dict[str, Counter[str]] = {}
    lists: dict[str, Counter[str]] = {column: Counter() for column in COLUMNS}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if report.skipped or report.when == "call":
                for column, entry in _columns(report):
                    folder = report.nodeid.rpartition("/")[0]
                    table.setdefault(folder, Counter())[column] += 1
                    lists[column][entry] += 1

    write = terminalreporter.write_line
    terminalreporter.section("models that took part")
    write(" " * 30 + "".join(f"{column:>12}" for column in COLUMNS))
    for folder, counts in [*sorted(table.items()), ("all", sum(table.values(), Counter()))]:
        write(f"{folder:30}" + "".join(f"{counts[column]:12}" for column in COLUMNS))
    if config.getoption("keep_keras"):
        return
    for column, what in COLUMNS.items():
        if what and lists[column]:
            write(f"{column}: these {what}")
            for entry, count in lists[column].items():
                write(f"  {entry}" + (f" ({count})" if count > 1 else ""))
    for reason, edits in EDITS.items():
        write(f"edited, as {reason}")
        for name, old, new in edits:
            write(f"  tests/{name}: {old} -> {new}")


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
            options = [*options, "tests"]
        fixed = ["--rootdir", folder, "-p", "no:cacheprovider"]
        return pytest.main([*fixed, *options], plugins=[sys.modules[__name__]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
