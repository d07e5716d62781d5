"""A wrapped Flax model and its Keras twin give the same outputs, explanations and scores."""

import functools

import jax
import numpy as np
import pytest
from xplique import metrics

from tests.architectures import (
    ARCHITECTURES,
    WITH_LAYERS_OF_CONVOLUTION,
    L,
    Pair,
    digits,
    make_pair,
    plain_twin,
    tf,
)
from tests.equality_table import (
    METHODS,
    TOLERANCE,
    compare,
    explain,
    largest_difference,
    make_explainer,
    seed_everything,
)
from tests.weights import copy_weights
from xplique_flax import FlaxWrapper

WITHOUT_CONVOLUTION = (
    "transformer",
    "time_major",
    "recurrent",
    "perceptron",
    "normalised",
    "nnx_series",
)
WITH_REDUCER = (
    "Saliency",
    "GradientInput",
    "IntegratedGradients",
    "SmoothGrad",
    "SquareGrad",
    "VarGrad",
    "GuidedBackprop",
    "DeconvNet",
)
SCORED = ("plain", "residual", "segmenter", "detector", "series", "normalised")


def cases(inapplicable: bool) -> list:
    return [
        pytest.param(name, method, id=f"{name}-{method}")
        for name, architecture in ARCHITECTURES.items()
        for method in METHODS
        if (method in architecture.inapplicable) == inapplicable
    ]


def convolution_cases() -> list[tuple[str, str]]:
    return [
        (name, layer)
        for name, architecture in ARCHITECTURES.items()
        for layer in architecture.convolutions
    ]


# ------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_twin_is_one(name):
    """Without the wrapper: what is compared with must itself be right."""
    pair = make_pair(name)
    assert largest_difference(pair.apply(pair.inputs), pair.twin(pair.inputs)) <= 1e-5

    weights = np.random.default_rng(0).normal(size=pair.twin.output_shape[1:]).astype(np.float32)

    # In a graph, where TensorFlow does not compute the gradients of kernels that nobody asked for.
    @tf.function
    def twins(inputs):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(inputs)
            score = tf.reduce_sum(pair.twin(inputs) * weights)
        return tape.gradient(score, inputs)

    flax = jax.grad(lambda inputs: (pair.apply(inputs) * weights).sum())(pair.inputs)
    assert largest_difference(flax, twins(tf.constant(pair.inputs))) <= 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs(name):
    pair = make_pair(name)
    reference = pair.twin(pair.inputs)
    assert largest_difference(pair.wrapped(pair.inputs), reference) <= 1e-5
    assert pair.wrapped.output_shape == pair.twin.output_shape
    batches = pair.wrapped.predict(pair.inputs, batch_size=2, verbose=0)
    assert largest_difference(batches, reference) <= 1e-5


@pytest.mark.parametrize(
    "name", [name for name, architecture in ARCHITECTURES.items() if architecture.one_to_one]
)
def test_weights_of_layers(name):
    pair = make_pair(name)
    layers = [layer for layer in pair.twin.layers if layer.weights]
    for layer in layers:
        ours = pair.wrapped.get_layer(layer.name).get_weights()
        for own, reference in zip(ours, layer.get_weights(), strict=True):
            np.testing.assert_array_equal(own, reference)
    assert {layer.name for layer in pair.wrapped.layers if layer.weights} == {
        layer.name for layer in layers
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_of_layers(name):
    """Every module and ReLU of the twin is found in the wrapped model, with the same output."""
    pair = make_pair(name)
    named = [
        layer
        for layer in pair.twin.layers
        # Of the shared convolution, Keras would take the output of the first call.
        if (layer.weights or isinstance(layer, L.ReLU))
        and len(layer._inbound_nodes) == 1
        # Constants and the inside of a loop are no layers of their own.
        and layer.name not in ("Embed_0", "weights", "place", "cell")
    ]
    names = [layer.name for layer in named]

    def outputs(model):
        layers = {name: model.get_layer(name).output for name in names}
        return tf.keras.Model(model.inputs[0], layers)(pair.inputs)

    ours, reference = outputs(pair.wrapped), outputs(pair.twin)
    for name in names:
        assert largest_difference(ours[name], reference[name]) <= 1e-5, name


# ------------------------------------------------------------------------------- the explanations


@pytest.mark.parametrize(("name", "method"), cases(inapplicable=False))
def test_explanations(name, method):
    assert compare(make_pair(name), method) <= TOLERANCE


@pytest.mark.parametrize(("name", "method"), cases(inapplicable=True))
def test_methods_that_do_not_apply(name, method):
    """What Keras models cannot do either fails, and does so for the same reason."""
    pair = make_pair(name)
    with pytest.raises(Exception):  # noqa: B017, PT011 - StopIteration, ValueError and others
        explain(pair, pair.twin, method)
    if name in WITHOUT_CONVOLUTION and method in WITH_LAYERS_OF_CONVOLUTION:
        with pytest.raises(ValueError, match="convolution"):
            explain(pair, pair.wrapped, method)
    else:
        with pytest.raises(Exception):  # noqa: B017, PT011
            explain(pair, pair.wrapped, method)


@pytest.mark.parametrize("method", METHODS)
def test_without_input_shape(method):
    """What does not look inside needs no shape; what does says that it does."""
    pair = make_pair("nested")
    wrapped = FlaxWrapper(pair.module, pair.variables)
    if method in (*WITH_LAYERS_OF_CONVOLUTION, "GuidedBackprop", "DeconvNet"):
        with pytest.raises(ValueError, match="input_shape"):
            explain(pair, wrapped, method)
    else:
        ours = explain(pair, wrapped, method)
        assert largest_difference(ours, explain(pair, pair.twin, method)) <= TOLERANCE


@pytest.mark.parametrize("method", WITH_LAYERS_OF_CONVOLUTION)
@pytest.mark.parametrize(("name", "layer"), convolution_cases())
def test_layer_by_name(name, layer, method):
    assert compare(make_pair(name), method, conv_layer=layer) <= TOLERANCE


def test_layers_differ():
    """Or else the test above would not see that `conv_layer` is ignored."""
    pair = make_pair("residual")
    first = explain(pair, pair.wrapped, "GradCAM", conv_layer="Conv_0")
    assert largest_difference(explain(pair, pair.wrapped, "GradCAM"), first) > 0.1


@pytest.mark.parametrize("batch_size", [None, 2, 7])
@pytest.mark.parametrize(
    "method", ["Saliency", "SmoothGrad", "GradCAM", "GuidedBackprop", "Rise", "KernelShap"]
)
def test_batch_sizes(method, batch_size):
    """All at once, and batches of which the last is smaller."""
    assert compare(make_pair("nested"), method, batch_size=batch_size) <= TOLERANCE


@pytest.mark.parametrize("batch_size", [None, 2, 7])
@pytest.mark.parametrize("name", ["patches", "time_major"])
def test_batch_sizes_of_folded_batches(name, batch_size):
    for method in ("Saliency", "SmoothGrad", "Occlusion"):
        assert compare(make_pair(name), method, batch_size=batch_size) <= TOLERANCE


@pytest.mark.parametrize("reducer", ["min", "max", "sum", None])
@pytest.mark.parametrize("method", WITH_REDUCER)
def test_reducers(method, reducer):
    assert compare(make_pair("residual"), method, reducer=reducer) <= TOLERANCE


@pytest.mark.parametrize("output_layer", ["Dense_0", -2])
def test_output_layer(output_layer):
    assert compare(make_pair("plain"), "Saliency", output_layer=output_layer) <= TOLERANCE


@pytest.mark.parametrize("part", ["position", "proba", "class"])
def test_operators_for_parts_of_a_detection(part):
    operator = f"object detection box {part}"
    for method in ("Saliency", "Rise"):
        assert compare(make_pair("detector"), method, operator=operator) <= TOLERANCE


def difference_of_outputs(model, inputs, targets):
    outputs = model(inputs)
    return (outputs[:, 0] - outputs[:, 2]) * tf.reduce_sum(targets, -1)


@pytest.mark.parametrize(
    "method", ["Saliency", "IntegratedGradients", "GuidedBackprop", "Occlusion", "KernelShap"]
)
def test_own_operator(method):
    pair = make_pair("residual")
    assert compare(pair, method, operator=difference_of_outputs) <= TOLERANCE


@pytest.mark.parametrize("method", ["Saliency", "GradCAM", "Occlusion"])
def test_datasets(method):
    pair = make_pair("plain")
    dataset = tf.data.Dataset.from_tensor_slices((pair.inputs, pair.targets)).batch(2)
    ours = make_explainer(pair, pair.wrapped, method).explain(dataset, None)
    assert largest_difference(ours, explain(pair, pair.twin, method)) <= TOLERANCE


# ------------------------------------------------------------------------------------ the metrics


@functools.cache
def saliency(name: str) -> np.ndarray:
    pair = make_pair(name)
    return explain(pair, pair.twin, "Saliency")


def score(pair: Pair, model, metric: str, **options) -> float:
    """A metric that asks the model about explanations: the same ones for both models."""
    seed_everything()
    options = {"operator": pair.architecture.operator, **options}
    evaluated = getattr(metrics, metric)(model, pair.inputs, pair.targets, **options)
    return evaluated(saliency(pair.name))


FIDELITY = {
    "Deletion": {"steps": 5},
    "Insertion": {"steps": 5},
    # Of fewer cells, some samples would hide the same ones, and the order of equals is by rounding.
    "MuFidelity": {"grid_size": 8, "nb_samples": 30},
    "AverageDropMetric": {},
    "AverageGainMetric": {},
    "AverageIncreaseMetric": {},
}


@functools.cache
def fidelity_of_twin(name: str, metric: str) -> float:
    pair = make_pair(name)
    return score(pair, pair.twin, metric, batch_size=2, **FIDELITY[metric])


@pytest.mark.parametrize("metric", FIDELITY)
@pytest.mark.parametrize("name", SCORED)
def test_fidelity(name, metric):
    pair = make_pair(name)
    ours = score(pair, pair.wrapped, metric, batch_size=2, **FIDELITY[metric])
    assert ours == pytest.approx(fidelity_of_twin(name, metric), rel=TOLERANCE)


@pytest.mark.parametrize("metric", FIDELITY)
def test_fidelity_of_all_at_once(metric):
    pair = make_pair("plain")
    ours = score(pair, pair.wrapped, metric, batch_size=None, **FIDELITY[metric])
    reference = score(pair, pair.twin, metric, batch_size=None, **FIDELITY[metric])
    assert ours == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize("metric", FIDELITY)
def test_fidelity_is_not_zero_everywhere(metric):
    """Or else the tests above would compare nothing."""
    assert max(abs(fidelity_of_twin(name, metric)) for name in SCORED) > 1e-3


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_fidelity_with_activation(activation):
    pair = make_pair("residual")
    reference = score(pair, pair.twin, "Deletion", activation=activation)
    assert score(pair, pair.twin, "Deletion") != pytest.approx(reference, rel=0.01)
    ours = score(pair, pair.wrapped, "Deletion", activation=activation)
    assert ours == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize("metric", ["Complexity", "Sparseness"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_complexity(name, metric):
    pair = make_pair(name)
    reference = getattr(metrics, metric)()(saliency(name))
    assert reference > 0
    ours = getattr(metrics, metric)()(explain(pair, pair.wrapped, "Saliency"))
    assert ours == pytest.approx(reference, rel=TOLERANCE)


def score_of_explainer(pair: Pair, model, metric: str, method: str, **options) -> float:
    """A metric that asks an explainer for explanations of its own."""
    seed_everything()
    evaluated = getattr(metrics, metric)(model, pair.inputs, pair.targets, **options)
    return evaluated(make_explainer(pair, model, method))


@pytest.mark.parametrize("method", ["Saliency", "GradCAM", "GuidedBackprop"])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_stability(method, distance):
    pair = make_pair("nested")
    options = {"nb_samples": 4, "distance": distance}
    reference = score_of_explainer(pair, pair.twin, "AverageStability", method, **options)
    assert reference > 0
    ours = score_of_explainer(pair, pair.wrapped, "AverageStability", method, **options)
    assert ours == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["series", "perceptron"])
def test_stability_without_pictures(name):
    pair = make_pair(name)
    options = {"nb_samples": 4}
    reference = score_of_explainer(pair, pair.twin, "AverageStability", "Saliency", **options)
    assert reference > 0
    ours = score_of_explainer(pair, pair.wrapped, "AverageStability", "Saliency", **options)
    assert ours == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize("method", ["GradientInput", "GradCAM"])
@pytest.mark.parametrize("name", ["plain", "residual"])
def test_random_logit(name, method):
    pair = make_pair(name)
    reference = score_of_explainer(pair, pair.twin, "RandomLogitMetric", method)
    assert reference < 0.99
    ours = score_of_explainer(pair, pair.wrapped, "RandomLogitMetric", method)
    assert ours == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "stop_layer"),
    [
        ("plain", 0.25),
        ("plain", "Conv_0"),
        ("nested", 1.0),
        ("shared", "first"),
        ("series", 0.5),
        ("residual", "Block_1.BatchNorm_1"),
        ("perceptron", 2),
    ],
)
def test_model_randomization(name, stop_layer):
    pair = make_pair(name)
    before = pair.wrapped.get_weights()

    def randomized(model):
        return score_of_explainer(
            pair,
            model,
            "ModelRandomizationMetric",
            "GradientInput",
            randomization_strategy=metrics.ProgressiveLayerRandomization(stop_layer),
        )

    reference = randomized(pair.twin)
    assert reference < 0.99, "the twin's explanations hardly change: equality would mean nothing"
    assert randomized(pair.wrapped) == pytest.approx(reference, rel=TOLERANCE)
    for own, previous in zip(pair.wrapped.get_weights(), before, strict=True):
        np.testing.assert_array_equal(own, previous)


def test_mege():
    """Models that learn from parts of the data, once wrapped and once as Keras twins."""
    inputs, targets = digits(24)
    pair = make_pair("plain")

    @jax.jit
    def step(variables, inputs, targets):
        def loss(variables):
            return -(targets * jax.numpy.log(pair.module.apply(variables, inputs))).sum(-1).mean()

        gradients = jax.grad(loss)(variables)
        return jax.tree.map(lambda value, grad: value - 0.3 * grad, variables, gradients)

    def learn(wrap):
        def algorithm(x_train, y_train, x_test, y_test):
            variables = pair.variables
            for _ in range(60):
                variables = step(variables, x_train, y_train)
            return wrap(jax.tree.map(np.asarray, variables))

        evaluated = metrics.MeGe(algorithm, inputs, targets, k_splits=4)
        explainer = functools.partial(make_explainer, pair, method="GradientInput")
        return evaluated.evaluate(explainer)

    def as_twin(variables):
        twin = plain_twin()
        copy_weights(variables, twin)
        return twin

    def as_wrapper(variables):
        return FlaxWrapper(pair.module, variables, input_shape=inputs.shape[1:])

    reference = learn(as_twin)
    assert all(0 < value < 1 for value in reference)
    assert learn(as_wrapper) == pytest.approx(reference, rel=TOLERANCE)
