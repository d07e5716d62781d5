"""Xplique's other modules give the same results for a wrapped Flax model and for its Keras twin.

They are concepts, feature visualisation, examples, and the helpers for detection and segmentation.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import SGDClassifier
from xplique import Tasks, attributions
from xplique import example_based as examples
from xplique import features_visualizations as visualisation
from xplique.commons import forgrad
from xplique.commons.operators import predictions_operator
from xplique.commons.operators_operations import get_operator
from xplique.concepts import Cav, CraftManagerTf, CraftTf, Tcav
from xplique.concepts.holistic_craft import PartialExplainer
from xplique.concepts.tf import HolisticCraftTf, TfLatentExtractor
from xplique.concepts.tf.layered_model_latent_extractor import (
    LayeredLatentData,
    LayeredModelExtractorBuilder,
)
from xplique.example_based import projections
from xplique.features_visualizations import Objective
from xplique.utils_functions import segmentation
from xplique.utils_functions.classification.tf import TfClassifierTensor
from xplique.utils_functions.common.tf.gradients_check import check_model_gradients
from xplique.utils_functions.object_detection.base.box_manager import BoxFormat, BoxType
from xplique.utils_functions.object_detection.tf.box_formatter import TfBaseBoxFormatter
from xplique.utils_functions.object_detection.tf.box_model_wrapper import TfBoxesModelWrapper

from tests.architectures import K, Pair, digits, make_pair, photographs, tf
from tests.equality_table import TOLERANCE, largest_difference, seed_everything

# The layers at which the models are cut: their outputs are not negative, as CRAFT needs them.
CUTS = [("plain", "relu_1"), ("residual", "Block_0.relu_1"), ("nnx_residual", "blocks.0.relu_1")]


@functools.cache
def samples(name: str) -> tuple[np.ndarray, np.ndarray]:
    """More samples than a pair has, with their labels one-hot."""
    return digits(60) if name == "plain" else photographs(40)


def up_to(model: K.Model, layer: str) -> K.Model:
    """Return a model up to a layer, in the way that is usual for its kind."""
    if hasattr(model, "truncate"):
        return model.truncate(layer)
    return K.Model(model.inputs[0], model.get_layer(layer).output)


def split(model: K.Model, layer: str) -> tuple[K.Model, K.Model]:
    if hasattr(model, "split"):
        return model.split(layer)
    middle = model.get_layer(layer).output
    return K.Model(model.inputs[0], middle), K.Model(middle, model.outputs[0])


def logits(pair: Pair, model: K.Model) -> K.Model:
    return up_to(model, "Dense_1") if pair.name == "plain" else model


def compare(
    pair: Pair, run: Callable[[K.Model], dict[str, Any]], tolerance: float = TOLERANCE
) -> None:
    """Assert that a function gives equal arrays for both models.

    Floats are equal but for the tolerance, and everything else is equal.
    """
    seed_everything()
    ours = run(pair.wrapped)
    seed_everything()
    reference = run(pair.twin)
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        own, expected = np.asarray(ours[name]), np.asarray(expected)
        if np.issubdtype(expected.dtype, np.floating):
            assert largest_difference(own, expected) <= tolerance, name
        else:
            np.testing.assert_array_equal(own, expected, err_msg=name)


def fails_alike(
    pair: Pair, run: Callable[[K.Model], Any], error: type[Exception], match: str
) -> None:
    """Assert that a function fails for both models, with the same message."""
    messages = []
    for model in (pair.twin, pair.wrapped):
        seed_everything()
        with pytest.raises(error, match=match) as raised:
            run(model)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


# --------------------------------------------------------------------------------------- concepts


def cav(name: str, layer: str | int, classifier: Any) -> Callable[[K.Model], dict[str, Any]]:
    inputs, labels = samples(name)
    positive = labels.argmax(-1) < labels.shape[-1] // 2
    return lambda model: {
        "cav": Cav(model, layer, classifier, batch_size=16)(inputs[positive], inputs[~positive])
    }


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("plain", "Conv_1"),
        ("plain", "Dense_0"),
        ("plain", -1),
        ("residual", "Block_1.Conv_0"),
        ("nnx_residual", "blocks.0.norm"),
        ("nnx_residual", "again"),  # which is called twice
    ],
)
def test_cav(name, layer):
    compare(make_pair(name), cav(name, layer, "SGD"))


# A fixed number of steps: a criterion to stop would turn rounding into other numbers of them.
@pytest.mark.parametrize(
    "classifier",
    ["SVC", SGDClassifier(loss="log_loss", max_iter=20, tol=None)],
    ids=["SVC", "own"],
)
def test_classifiers_of_cav(classifier):
    compare(make_pair("plain"), cav("plain", "relu_1", classifier))


@pytest.mark.parametrize(
    ("name", "layer", "batch_size"),
    [
        ("plain", "Conv_1", 7),
        ("plain", "relu_1", None),
        ("plain", "Dense_0", 64),
        ("residual", "Conv_0", 25),
        ("residual", "Block_1.Conv_0", 64),
        ("nnx_residual", "blocks.0.norm", 25),
        ("nnx_residual", "again", None),
    ],
)
def test_tcav(name, layer, batch_size):
    pair = make_pair(name)
    inputs, _ = samples(name)
    shape = pair.twin.get_layer(layer).output.shape[1:]
    vector = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def run(model):
        tcav = Tcav(model, layer, batch_size)
        return {
            "score": tcav(inputs, 1, vector),
            "derivatives": tcav.directional_derivative(
                tf.constant(inputs), tf.constant(1), tf.constant(vector)
            ),
        }

    compare(pair, run)


@pytest.mark.parametrize(("name", "layer"), [*CUTS, ("plain", "relu_2")])
def test_craft(name, layer):
    pair = make_pair(name)
    inputs, _ = samples(name)

    def run(model):
        craft = CraftTf(
            *split(logits(pair, model), layer),
            number_of_concepts=3,
            batch_size=16,
            patch_size=inputs.shape[1] // 2,
        )
        crops, crops_u, bank = craft.fit(inputs[:10], class_id=2)
        return {
            "crops": crops,
            "crops_u": crops_u,
            "bank": bank,
            "transformed": craft.transform(inputs[10:15]),
            "global importances": craft.estimate_importance(nb_design=4),
            "local importances": craft.estimate_importance(inputs[:2], nb_design=4),
            "order": craft.sensitivity.most_important_concepts,
        }

    compare(pair, run)


@pytest.mark.parametrize(("name", "layer"), CUTS)
def test_craft_manager(name, layer):
    pair = make_pair(name)
    inputs, labels = samples(name)
    predicted = np.bincount(np.argmax(pair.twin(inputs), -1), minlength=labels.shape[-1])
    classes = np.flatnonzero(predicted > 2).tolist()

    def run(model):
        manager = CraftManagerTf(
            *split(logits(pair, model), layer),
            inputs,
            labels.argmax(-1),
            list_of_class_of_interest=classes,
            number_of_concepts=2,
            patch_size=inputs.shape[1] // 2,
        )
        manager.fit(nb_samples_per_class=4)
        manager.estimate_importance(nb_design=4)
        results = {"predictions": manager.compute_predictions()}
        for label, craft in manager.craft_instances.items():
            results[f"inputs {label}"] = craft.factorization.inputs
            results[f"bank {label}"] = craft.factorization.concept_bank_w
            results[f"importances {label}"] = craft.sensitivity.importances
        return results

    compare(pair, run)


def extractor_of_builder(model: K.Model, layer: str) -> TfLatentExtractor:
    index = [known.name for known in model.layers].index(layer)
    return LayeredModelExtractorBuilder.build(model, index, batch_size=4)


def extractor_of_parts(model: K.Model, layer: str) -> TfLatentExtractor:
    features, head = split(model, layer)
    return TfLatentExtractor(
        model,
        lambda inputs: LayeredLatentData(features(inputs)),
        lambda latent: head(latent.activations),
        LayeredLatentData,
        TfClassifierTensor.from_predictions,
        batch_size=4,
    )


@pytest.mark.parametrize(
    ("name", "layer", "extractor"),
    [*[(*cut, extractor_of_builder) for cut in CUTS], (*CUTS[1], extractor_of_parts)],
)
def test_holistic_craft(name, layer, extractor):
    pair = make_pair(name)
    inputs = tf.constant(samples(name)[0][:10])

    def run(model):
        craft = HolisticCraftTf(extractor(logits(pair, model), layer), number_of_concepts=3)
        craft.fit(inputs)
        results = {
            "forward": craft.latent_extractor(inputs).tensor,
            "bank": craft.factorization.concept_bank_w,
            "coefficients": craft.transform(),
            "transformed": craft.transform(inputs[:5]),
        }
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(inputs)
            encoded = craft.encode(inputs[:2], differentiable=True)[0]
            decoded = craft.decode(encoded.latent_data, encoded.coeffs_u).tensor
            score = decoded[:, 2]
        results["encoded"] = encoded.coeffs_u
        results["decoded"] = decoded
        results["gradient"] = tape.gradient(score, inputs)[:2]
        for method, options in (
            ("gradient_input", {}),
            ("sobol", {"grid_size": 2, "nb_design": 2}),
        ):
            results[method] = craft.estimate_importance(
                inputs[:3], predictions_operator, 2, method=method, **options
            )
        occlusion = PartialExplainer(attributions.Occlusion, patch_size=4, patch_stride=4)
        results["localisation"] = craft.attribute_concepts_to_inputs(inputs[:1], occlusion)
        return results

    compare(pair, run)


# --------------------------------------------------------------------------- feature visualisation


def direction(model: K.Model, layer: str) -> Objective:
    shape = model.get_layer(layer).output.shape[1:]
    vectors = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    return Objective.direction(model, layer, list(vectors))


# For a model and two of its layers.
OBJECTIVES = {
    "layer": lambda model, conv, last: Objective.layer(model, conv),
    "mean of layer": lambda model, conv, last: Objective.layer(model, last, reducer="mean"),
    "channel": lambda model, conv, last: Objective.channel(model, conv, [0, 3]),
    "neuron": lambda model, conv, last: Objective.neuron(model, last, [1, 2]),
    "neuron of map": lambda model, conv, last: Objective.neuron(model, conv, 37),
    "direction": lambda model, conv, last: direction(model, conv),
    "sum": lambda model, conv, last: (
        Objective.channel(model, conv, [0, 3]) + Objective.neuron(model, last, [1, 2]) * 2.0
    ),
    "difference": lambda model, conv, last: (
        Objective.neuron(model, last, 1) - Objective.layer(model, conv) * 0.1
    ),
}
VISUALISED = [
    ("plain", "Conv_1", "Dense_1"),
    ("residual", "Block_1.Conv_0", "Dense_0"),
    ("nnx_residual", "blocks.0.norm", "head.layers.2"),
]


def visualise(
    name: str, objective: str, conv: str, last: str, tolerance: float = TOLERANCE, **options: Any
) -> None:
    def run(model):
        images, names = visualisation.optimize(
            OBJECTIVES[objective](model, conv, last), nb_steps=4, **options
        )
        return {
            "names": names,
            **{f"images {index}": saved for index, saved in enumerate(images)},
        }

    compare(make_pair(name), run, tolerance)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("name", "conv", "last", "use_fft"),
    [*[(*case, True) for case in VISUALISED], (*VISUALISED[1], False)],
)
def test_optimize(name, conv, last, objective, use_fft):
    visualise(name, objective, conv, last, use_fft=use_fft, transformations=None, custom_shape=None)


@pytest.mark.parametrize(
    "options",
    [
        {"custom_shape": (24, 20), "transformations": None},
        {"custom_shape": (32, 32)},
        {"custom_shape": None, "transformations": None, "save_every": 2, "warmup_steps": 2},
        {
            "custom_shape": None,
            "transformations": None,
            "image_normalizer": "clip",
            "values_range": (-1, 1),
            "regularizers": [visualisation.l2_reg(0.1), visualisation.total_variation_reg(0.01)],
        },
    ],
    ids=["custom shape", "standard transformations", "warm-up", "regularizers"],
)
@pytest.mark.parametrize(("name", "conv", "last"), VISUALISED)
def test_options_of_optimize(name, conv, last, options):
    visualise(name, "sum", conv, last, **options)


def maco(
    name: str, objective: str, conv: str, last: str, shape: Any = (24, 24)
) -> Callable[[K.Model], dict[str, Any]]:
    dataset = tf.data.Dataset.from_tensor_slices(samples(name)[0]).batch(8)

    def run(model):
        image, transparency = visualisation.maco(
            OBJECTIVES[objective](model, conv, last),
            maco_dataset=dataset,
            nb_steps=4,
            nb_crops=6,
            custom_shape=shape,
        )
        return {"image": image, "transparency": transparency}

    return run


@pytest.mark.parametrize("objective", ["layer", "mean of layer", "neuron of map"])
@pytest.mark.parametrize(("name", "conv", "last"), VISUALISED)
def test_maco(name, conv, last, objective):
    compare(make_pair(name), maco(name, objective, conv, last))


@pytest.mark.parametrize(("name", "conv", "last"), VISUALISED)
def test_maco_of_several_objectives(name, conv, last):
    """Xplique wraps the outputs in a list once more, which fails for any model."""
    fails_alike(
        make_pair(name),
        maco(name, "difference", conv, last),
        AttributeError,
        "has no attribute 'dtype'",
    )


def test_maco_without_a_shape():
    fails_alike(
        make_pair("plain"), maco("plain", "layer", "Conv_1", "Dense_1", None), TypeError, "NoneType"
    )


# --------------------------------------------------------------------------------- example based


# Xplique cuts a model by calling all layers after the cut one after another.
PROJECTIONS = {
    "latent space": lambda model: projections.LatentSpaceProjection(model, "relu_1"),
    "latent space, flat": lambda model: projections.LatentSpaceProjection(model, "relu_2"),
    "latent space, last but one": lambda model: projections.LatentSpaceProjection(model, -2),
    "latent space, last convolution": lambda model: projections.LatentSpaceProjection(
        model, "last_conv"
    ),
    "latent space, cut before": lambda model: projections.LatentSpaceProjection(
        up_to(model, "relu_2"), None
    ),
    "gradient": lambda model: projections.HadamardProjection(model),
    "gradient in latent space": lambda model: projections.HadamardProjection(model, "relu_1"),
    "gradient of parts": lambda model: projection_of_parts(model, "relu_1"),
    "gradient of operator": lambda model: projections.HadamardProjection(
        model, "Dense_0", operator=predictions_operator
    ),
    "saliency": lambda model: projections.AttributionProjection(model),
    "saliency in latent space": lambda model: projections.AttributionProjection(
        model, latent_layer="relu_1"
    ),
    "occlusion": lambda model: projections.AttributionProjection(
        model, attributions.Occlusion, patch_size=2, patch_stride=2, operator=predictions_operator
    ),
    "function": lambda model: lambda inputs, targets=None: model(inputs),
}


def projection_of_parts(model: K.Model, layer: str) -> projections.Projection:
    features, predictor = split(model, layer)
    return projections.HadamardProjection(features_extractor=features, predictor=predictor)


def explain_by_examples(
    name: str, model: K.Model, method: Any, /, **options: Any
) -> dict[str, np.ndarray]:
    """Explain some samples by the others, whose labels are their indices."""
    inputs, labels = samples(name)
    cases, targets = inputs[12:], labels[12:]
    explainer = method(
        cases_dataset=cases,
        labels_dataset=np.arange(len(cases)),
        targets_dataset=targets,
        case_returns="all",
        batch_size=20,
        **options,
    )
    arguments = [inputs[:12], labels[:12]]
    if method is examples.LabelAwareCounterFactuals:
        arguments.append(np.roll(labels[:12], 1, axis=-1))
    results = dict(explainer(*arguments))
    if issubclass(method, examples.Prototypes):
        results.update(explainer.get_global_prototypes())
    return {key: np.asarray(value) for key, value in results.items()}


def compare_examples(
    name: str, run: Callable[[K.Model], dict[str, np.ndarray]], least: int = 5
) -> None:
    """Assert that examples, labels and indices are the same ones, and the rest close.

    The examples of all samples must be at least so many different ones.
    """
    pair = make_pair(name)
    seed_everything()
    ours = run(pair.wrapped)
    seed_everything()
    reference = run(pair.twin)
    assert ours.keys() == reference.keys() >= {"examples", "distances", "labels"}
    for key, expected in reference.items():
        own = ours[key]
        if "dist" in key or "weights" in key:
            # Where there is no example, its distance is infinite.
            there = np.isfinite(expected)
            np.testing.assert_array_equal(np.isfinite(own), there, err_msg=key)
            assert largest_difference(own[there], expected[there]) <= TOLERANCE, key
        else:
            np.testing.assert_array_equal(own, expected, err_msg=key)
    assert len(np.unique(reference["labels"])) >= least


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_projections(projection):
    compare_examples(
        "plain",
        lambda model: explain_by_examples(
            "plain",
            model,
            examples.SimilarExamples,
            projection=PROJECTIONS[projection](model),
            k=3,
        ),
    )


@pytest.mark.parametrize("distance", ["manhattan", "cosine", "chebyshev", 3])
def test_distances(distance):
    compare_examples(
        "plain",
        lambda model: explain_by_examples(
            "plain",
            model,
            examples.SimilarExamples,
            projection=projections.LatentSpaceProjection(model, "relu_2"),
            distance=distance,
            k=3,
        ),
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("plain", {"latent_layer": "relu_1"}),
        ("plain", {"latent_layer": "last_conv"}),
        ("plain", {"latent_layer": "relu_1", "attribution_method": attributions.Saliency}),
        (
            "plain",
            {
                "attribution_method": attributions.IntegratedGradients,
                "steps": 4,
                "operator": predictions_operator,
            },
        ),
        ("residual", {}),
        ("residual", {"latent_layer": "Block_1.relu_1"}),
        ("nnx_residual", {"latent_layer": "blocks.1.relu_1", "operator": predictions_operator}),
    ],
)
def test_cole(name, options):
    compare_examples(
        name,
        lambda model: explain_by_examples(name, model, examples.Cole, model=model, k=3, **options),
    )


# By pair: a projection in a latent space, and one with a gradient.
SEARCHED = {
    "plain": (
        lambda model: projections.LatentSpaceProjection(model, "relu_1"),
        lambda model: projections.HadamardProjection(model, "relu_1"),
    ),
    "residual": (
        lambda model: projections.LatentSpaceProjection(model, "Block_1.relu_1"),
        lambda model: projection_of_parts(model, "Block_0.relu_1"),
    ),
    "nnx_residual": (
        lambda model: projections.LatentSpaceProjection(model, "blocks.1.relu_1"),
        lambda model: projections.AttributionProjection(model, latent_layer="blocks.1.relu_1"),
    ),
}


@pytest.mark.parametrize(
    ("name", "index"),
    [("plain", 0), ("plain", 1), ("residual", 1), ("nnx_residual", 0), ("nnx_residual", 1)],
)
@pytest.mark.parametrize(
    "method",
    [
        examples.NaiveCounterFactuals,
        examples.LabelAwareCounterFactuals,
        examples.KLEORSimMiss,
        examples.KLEORGlobalSim,
    ],
)
def test_searches(method, name, index):
    compare_examples(
        name,
        lambda model: explain_by_examples(
            name, model, method, projection=SEARCHED[name][index](model), k=2
        ),
        least=2 if method is examples.KLEORGlobalSim else 5,  # it finds few
    )


def test_xplique_cannot_cut_beside_a_connection():
    """Xplique calls the layers in a row, which fails for native models too: `split` does not."""
    for name, layer in CUTS[1:]:
        pair = make_pair(name)
        with pytest.raises((ValueError, NotImplementedError)):
            projections.HadamardProjection(pair.twin, layer)
        with pytest.raises(ValueError, match=r"do not follow each other in a row.*split"):
            projections.HadamardProjection(pair.wrapped, layer)(pair.inputs, pair.targets)


# Prototypes are searched for among vectors. After a softmax, the gradients of many samples are so
# small that these vectors are all but equal, and rounding would decide between them.
@pytest.mark.parametrize(
    ("name", "projection"),
    [
        ("plain", lambda model: projections.LatentSpaceProjection(model, "relu_2")),
        (
            "plain",
            lambda model: projections.HadamardProjection(up_to(model, "Dense_1"), "relu_2"),
        ),
        (
            "plain",
            lambda model: projections.AttributionProjection(
                up_to(model, "Dense_1"), latent_layer="Dense_0"
            ),
        ),
        ("residual", lambda model: projections.LatentSpaceProjection(model, "Dense_0")),
        ("nnx_residual", lambda model: projections.HadamardProjection(model, "head.layers.0")),
    ],
)
@pytest.mark.parametrize("method", [examples.ProtoGreedy, examples.MMDCritic, examples.ProtoDash])
def test_prototypes(method, name, projection):
    compare_examples(
        name,
        lambda model: explain_by_examples(
            name,
            model,
            method,
            projection=projection(model),
            nb_global_prototypes=6,
            nb_local_prototypes=2,
        ),
        least=2,
    )


# --------------------------------------------------------------------- detection and segmentation


class PixelBoxes(TfBaseBoxFormatter):
    """Takes the boxes of the detection model apart, and brings them to a range of zero to one."""

    def __init__(self):
        super().__init__(BoxType(BoxFormat.XYXY, is_normalized=False))

    def forward(self, predictions):
        return [
            self.format_predictions(
                {"boxes": boxes[:, :4], "scores": boxes[:, 4], "probas": boxes[:, 5:]},
                image_size=(16, 16),
            )
            for boxes in tf.unstack(predictions)
        ]


def test_model_of_boxes():
    pair = make_pair("detector")
    targets = tf.stack(PixelBoxes()(tf.constant(pair.targets)))[:, :2]

    def run(model):
        boxes_model = TfBoxesModelWrapper(model, PixelBoxes())
        listed = boxes_model(pair.inputs)
        boxes_model.output_as_list = False
        explainer = attributions.Saliency(
            lambda inputs: boxes_model(inputs), operator=Tasks.OBJECT_DETECTION
        )
        return {
            "list": tf.stack(listed),
            "filtered": listed[0].filter(confidence=0.3).tensor,
            "tensor": boxes_model(pair.inputs),
            "saliency": explainer(pair.inputs, targets),
        }

    compare(pair, run)


def test_model_of_boxes_is_not_functional():
    """Xplique asks any Keras model for its inputs, and its own model of boxes has none."""
    fails_alike(
        make_pair("detector"),
        lambda model: attributions.Saliency(TfBoxesModelWrapper(model, PixelBoxes())),
        AttributeError,
        "has no attribute 'inputs'",
    )


def test_holistic_craft_of_boxes():
    pair = make_pair("detector")
    operator = get_operator(Tasks.OBJECT_DETECTION)

    def run(model):
        features, head = split(model, "relu")
        extractor = TfLatentExtractor(
            model,
            lambda inputs: LayeredLatentData(features(inputs)),
            lambda latent: head(latent.activations),
            LayeredLatentData,
            PixelBoxes(),
            batch_size=2,
        )
        craft = HolisticCraftTf(extractor, number_of_concepts=3)
        craft.fit(tf.constant(pair.inputs))
        return {
            "boxes": tf.stack(extractor(pair.inputs)),
            "bank": craft.factorization.concept_bank_w,
            "importances": craft.estimate_importance(
                pair.inputs, operator, class_id=1, confidence=0.3
            ),
        }

    compare(pair, run)


def test_zones_of_segmentation():
    pair = make_pair("segmenter")

    def run(model):
        predictions = model(pair.inputs)[0]
        counts = np.bincount(np.ravel(np.argmax(predictions, -1)))
        first, second = (int(index) for index in counts.argsort()[-2:])
        zones = [segmentation.get_class_zone(predictions, index) for index in (first, second)]
        borders = [segmentation.get_in_out_border(zone) for zone in zones]
        masks = {
            "first": zones[0],
            "second": zones[1],
            "connected": segmentation.get_connected_zone(predictions, (8, 8)),
            "listed": segmentation.list_class_connected_zones(predictions, second, 4),
            "border": borders[0],
            "common": segmentation.get_common_border(*borders),
        }
        explainer = attributions.Saliency(model, operator=Tasks.SEMANTIC_SEGMENTATION)
        return {
            **{key: np.asarray(mask).astype(int) for key, mask in masks.items()},
            "saliency": explainer(pair.inputs[:1], masks["common"][None]),
        }

    compare(pair, run)


@pytest.mark.parametrize("name", ["plain", "residual", "nnx_residual"])
def test_forgrad(name):
    pair = make_pair(name)

    def run(model):
        explanations = attributions.Saliency(model)(pair.inputs, pair.targets)
        return {str(sigma): forgrad(explanations, sigma) for sigma in (1, 4)}

    compare(pair, run)


@pytest.mark.parametrize("name", ["plain", "residual", "nnx_residual", "detector", "segmenter"])
def test_check_of_gradients(name):
    """Of the twins it may end the process: TensorFlow aborts in the gradients of their kernels."""
    pair = make_pair(name)
    assert check_model_gradients(pair.wrapped, tf.constant(pair.inputs))
