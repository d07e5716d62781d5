"""In which sizes batches are computed, and of which functions samples are independent."""

from unittest.mock import Mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from xplique.attributions import (
    DeconvNet,
    GradCAM,
    GradCAMPP,
    GuidedBackprop,
    IntegratedGradients,
    Occlusion,
    Rise,
    Saliency,
)

from tests.architectures import ARCHITECTURES, digits, make_pair
from tests.compilations import compilations
from tests.equality_table import largest_difference
from xplique_flax import FlaxWrapper, batches
from xplique_flax.samples import Cost, cost_per_sample, traced_batch

IMAGES, TARGETS = digits(24)
RNG = np.random.default_rng(0)


class Net(nn.Module):
    """A network that notes for which batch sizes it is traced."""

    sizes: tuple = ()

    @nn.compact
    def __call__(self, x):
        traced.append(x.shape[0])
        x = nn.max_pool(nn.relu(nn.Conv(6, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


traced: list[int] = []
PARAMETERS = Net().init(jax.random.key(1), IMAGES)


@pytest.fixture
def wrapped():
    return FlaxWrapper(Net(), PARAMETERS)


def test_two_samples_are_not_traced_again():
    model = FlaxWrapper(Net(), PARAMETERS, input_shape=IMAGES.shape[1:])
    traced.clear()
    first, whole = model(IMAGES[:2]), model(IMAGES[:3])
    np.testing.assert_allclose(first, whole[:2], rtol=1e-6)
    maps, more = (Saliency(model)(IMAGES[:n], TARGETS[:n]) for n in (2, 3))
    np.testing.assert_allclose(maps, more[:2], rtol=1e-5)
    assert 3 in traced
    assert 2 not in traced


@pytest.mark.parametrize("size", [2, 3])
def test_settings_of_jax_are_those_of_the_first_call(size):
    model = FlaxWrapper(Net(), PARAMETERS, input_shape=IMAGES.shape[1:])
    with jax.default_matmul_precision("highest"):
        trace = model._fused.compiled.jitted._traced.trace(model._fused.leaves(), IMAGES[:size])
    assert "HIGHEST" in str(trace.jaxpr)


def test_two_samples_see_other_parameters():
    model = FlaxWrapper(Net(), PARAMETERS, input_shape=IMAGES.shape[1:])
    others = jax.tree.map(lambda leaf: 2 * leaf, PARAMETERS)
    model(IMAGES[:2])
    np.testing.assert_allclose(
        model.with_parameters(others)(IMAGES[:2]), Net().apply(others, IMAGES[:2]), rtol=1e-5
    )


def compiled_sizes(wrapped):
    """Return for how many batch sizes XLA has compiled the model, and its gradient."""
    forward = wrapped._fused.compiled
    return forward.jitted.compilations, forward.pullback.jitted.compilations


def sizes_of(function):
    """Return the sizes of the batches that a function was compiled for on a CPU."""
    return {shapes[0][0] for shapes in function.jitted._programs}


@pytest.mark.parametrize("number", [5, 8, 11, 15, 16, 24])
def test_each_direction_is_compiled_at_most_twice(wrapped, number):
    inputs, targets = IMAGES[:number], TARGETS[:number]
    for _ in range(2):
        Saliency(wrapped, batch_size=8)(inputs, targets)
        assert compiled_sizes(wrapped)[1] <= 2
        Occlusion(wrapped, patch_size=2, patch_stride=2, batch_size=8)(inputs, targets)
        assert compiled_sizes(wrapped)[0] <= 2


def test_a_rest_and_a_second_explainer_compile_nothing(wrapped):
    IntegratedGradients(wrapped, steps=5, batch_size=16)(IMAGES[:8], TARGETS[:8])
    before = compiled_sizes(wrapped)
    for number in (1, 3, 5, 7):
        Saliency(wrapped, batch_size=8)(IMAGES[:number], TARGETS[:number])
        IntegratedGradients(wrapped, steps=5, batch_size=16)(IMAGES[:number], TARGETS[:number])
    assert compiled_sizes(wrapped) == before


@pytest.mark.parametrize("method", [GuidedBackprop, DeconvNet])
def test_batches_of_a_guided_model_are_padded(method):
    wrapped = FlaxWrapper(Net(), PARAMETERS, input_shape=IMAGES.shape[1:])
    expected = method(wrapped, batch_size=8)(IMAGES, TARGETS)
    with compilations() as compiled:
        for number, batch_size in ((21, 8), (14, 7)):
            padded = method(wrapped, batch_size=batch_size)(IMAGES[:number], TARGETS[:number])
            assert largest_difference(padded, expected[:number]) < 1e-6
    assert compiled == []


@pytest.mark.parametrize("method", [GuidedBackprop, DeconvNet])
def test_large_batches_of_a_guided_model_are_run_in_pieces(method, monkeypatch):
    whole, split = (FlaxWrapper(Net(), PARAMETERS, input_shape=IMAGES.shape[1:]) for _ in range(2))
    expected = method(whole, batch_size=8)(IMAGES[:8], TARGETS[:8])
    monkeypatch.setattr(batches, "_IN_GRADIENT", 1)
    explainer = method(split, batch_size=8)
    assert largest_difference(explainer(IMAGES[:8], TARGETS[:8]), expected) < 1e-6
    (bridge,) = explainer.model._sections._bridges.values()
    assert sizes_of(bridge._function.pullback) == {2}


@pytest.mark.parametrize("method", [GradCAM, GradCAMPP])
def test_parts_between_watched_layers_are_compiled_at_most_twice(method):
    wrapped = FlaxWrapper(Net(), PARAMETERS, input_shape=IMAGES.shape[1:])
    method(wrapped, batch_size=8)(IMAGES[:21], TARGETS[:21])
    functions = [bridge._function for bridge in wrapped._sections._bridges.values()]
    functions += wrapped._fused.graph._functions.values()
    assert functions
    for function in functions:
        assert function.jitted.compilations <= 2
        assert function.pullback.jitted.compilations <= 2
    with compilations() as compiled:
        method(wrapped, batch_size=8)(IMAGES[3:], TARGETS[3:])
        assert compiled == []
        method(wrapped, batch_size=7)(IMAGES[:14], TARGETS[:14])
        assert compiled != []


def test_padded_batch_has_the_outputs_and_gradients_of_its_samples(wrapped):
    alone = [FlaxWrapper(Net(), PARAMETERS) for _ in range(2)]
    Saliency(wrapped)(IMAGES, TARGETS)
    wrapped(IMAGES)
    traced.clear()
    assert largest_difference(wrapped(IMAGES[:5]), alone[0](IMAGES[:5])) < 1e-6
    few = IMAGES[:5], TARGETS[:5]
    assert largest_difference(Saliency(wrapped)(*few), Saliency(alone[1])(*few)) < 1e-6
    assert 24 not in traced


def test_full_batch_runs_at_its_own_size(wrapped):
    wrapped(IMAGES[:4])
    traced.clear()
    wrapped(IMAGES)
    assert traced.count(24) == 1


def test_costs_are_read_from_a_trace_that_the_layers_were_found_in():
    wrapped = FlaxWrapper(Net(), PARAMETERS, input_shape=(8, 8, 1))
    traced.clear()
    wrapped(IMAGES)
    assert traced == [24]


def test_size_that_wastes_much_is_compiled(wrapped, monkeypatch):
    monkeypatch.setattr(batches, "_COMPILATION", 0)
    wrapped(IMAGES)
    wrapped(IMAGES[:4])
    assert compiled_sizes(wrapped)[0] == 2


@pytest.mark.parametrize(("samples", "size"), [(0.1, 2), (1.9, 2), (4, 4), (8, 8)])
def test_large_gradient_is_computed_in_pieces(wrapped, monkeypatch, samples, size):
    whole = Saliency(wrapped)(IMAGES[:22], TARGETS[:22])
    # What is alive at most is what the ReLU reads, its result, and its mask of single bytes.
    limit = samples * (4 + 4 + 1) * (8 * 8 * 6)
    monkeypatch.setattr(batches, "_IN_GRADIENT", limit)
    other = FlaxWrapper(Net(), PARAMETERS)
    pieces = Saliency(other)(IMAGES[:22], TARGETS[:22])
    assert sizes_of(other._fused.compiled.pullback) == {size}
    assert largest_difference(pieces, whole) < 1e-6


@pytest.mark.parametrize(
    ("compiled", "most", "number", "pieces", "size"),
    [
        ((), 4, 16, 4, 4),
        ((), 4, 18, 6, 3),  # five of four would be two samples more
        ((), 4, 22, 6, 4),  # eleven of two would be slower
        ((), 4, 3, 1, 3),
        ((), 7, 32, 8, 4),  # five of seven would be three samples more
        ((), 3, 32, 11, 3),  # sixteen of two would be slower
        ((16,), 4, 18, 5, 4),  # what is compiled
    ],
)
def test_batch_is_cut_into_pieces_that_waste_little(
    monkeypatch, compiled, most, number, pieces, size
):
    monkeypatch.setattr(batches, "_IN_GRADIENT", most)
    sizes = []

    def noting(array):
        sizes.append(len(array))
        return (array,)

    cut = batches.Batches(lambda *_: Cost(1.0, 1.0, 100), of_pullback=True)
    for each in compiled:
        cut.run(noting, [np.zeros((each, 2))])
    sizes.clear()
    array = RNG.normal(size=(number, 2))
    (result,) = cut.run(noting, [array])
    assert sizes == [size] * pieces
    np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize(("number", "is_traced"), [(50, False), (51, True)])
def test_pullback_is_traced_for_its_memory_only_where_a_batch_may_need_too_much(
    monkeypatch, number, is_traced
):
    monkeypatch.setattr(batches, "_IN_GRADIENT", 100)
    costs = {False: Cost(2.0, 1.0, 100), True: Cost(2.0, 4.0, 100)}
    cost_per_sample = Mock(side_effect=lambda _, of_pullback: costs[of_pullback])
    cut = batches.Batches(cost_per_sample).of_pullback()
    function = Mock(side_effect=lambda array: (array,))
    cut.run(function, [np.zeros((number, 3))])
    asked = {call.args for call in cost_per_sample.call_args_list}
    assert asked == {((3,), False)} | ({((3,), True)} if is_traced else set())
    sizes = [len(call.args[0]) for call in function.call_args_list]
    assert sizes == ([17, 17, 17] if is_traced else [50])


def test_batches_are_whole_where_jax_has_another_device_than_a_cpu(monkeypatch):
    expected = FlaxWrapper(Net(), PARAMETERS)(IMAGES[:22])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(batches, "_IN_FORWARD_PASS", 1)
    traced.clear()
    assert largest_difference(FlaxWrapper(Net(), PARAMETERS)(IMAGES[:22]), expected) < 1e-6
    assert 22 in traced and 4 not in traced


@pytest.mark.parametrize(("samples", "size"), [(0.1, 2), (1.9, 2), (4.1, 4), (8, 8)])
def test_large_forward_pass_is_computed_in_pieces(wrapped, monkeypatch, samples, size):
    whole = FlaxWrapper(Net(), PARAMETERS)(IMAGES[:22])
    # What is alive at most is what the pooling reads, of 8 x 8 x 6, and its result.
    limit = samples * 4 * (8 * 8 * 6 + 4 * 4 * 6)
    monkeypatch.setattr(batches, "_IN_FORWARD_PASS", limit)
    assert largest_difference(wrapped(IMAGES[:22]), whole) < 1e-6
    assert sizes_of(wrapped._fused.compiled) == {size}


def test_function_that_computes_nothing():
    wrapped = FlaxWrapper.from_function(lambda x: x)
    inputs = IMAGES.reshape(24, -1)
    np.testing.assert_array_equal(wrapped(inputs), inputs)
    targets = np.eye(64, dtype="float32")[:24]
    np.testing.assert_array_equal(Saliency(wrapped)(inputs, targets), targets)


@pytest.mark.parametrize(
    ("function", "alive"),
    [
        (lambda _, x: x + 1, 24),
        (lambda _, x: jnp.sin(x) * 2 - 1, 24),  # in the same place
        (lambda _, x: jnp.exp(jnp.concatenate([x, x], 1)).sum(1), 48 + 4),
        (lambda _, x: jnp.sin(x) + jnp.cos(x), 48),
        (lambda _, x: jax.jit(jnp.sin)(jnp.cos(x)), 24),
    ],
)
def test_bytes_that_are_alive_at_once(function, alive):
    assert cost_per_sample(traced_batch(function, 0.0, (6,))).alive == alive


@pytest.mark.parametrize(
    ("function", "alive"),
    [
        (lambda _, x: 3 * x, 24),
        (lambda _, x: jnp.exp(jnp.sin(x)), 48),  # cos(x), and exp(sin(x)) times the cotangent
        (lambda _, x: jnp.exp(jnp.sin(jnp.sin(x))), 72),
    ],
)
def test_bytes_that_are_alive_at_once_in_a_gradient(function, alive):
    batch = traced_batch(function, 0.0, (6,))
    assert cost_per_sample(batch, of_pullback=True).alive == alive


def test_batch_is_left_alone_where_samples_depend_on_each_other():
    seen = []

    def centered(x):
        seen.append(x.shape[0])
        return (x - x.mean(0)).reshape(len(x), -1)[:, :10] ** 2

    wrapped = FlaxWrapper.from_function(centered)
    for number in (8, 5):
        expected = centered(IMAGES[:number])
        assert largest_difference(wrapped(IMAGES[:number]), expected) < 1e-6
        gradient = jax.grad(lambda x: (centered(x) * TARGETS[: len(x)]).sum())(IMAGES[:number])
        saliency = Saliency(wrapped, reducer=None)(IMAGES[:number], TARGETS[:number])
        assert largest_difference(saliency, abs(gradient)) < 1e-5


def test_random_streams_stay_those_of_the_batch():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x.reshape(len(x), -1)
            noise = jax.random.normal(self.make_rng("noise"), x.shape)
            return nn.Dense(10)(x + noise)

    rngs = {"noise": jax.random.key(3)}
    parameters = Noisy().init({"params": jax.random.key(0), **rngs}, IMAGES)
    wrapped = FlaxWrapper(Noisy(), parameters, rngs=rngs)
    wrapped(IMAGES)
    expected = Noisy().apply(parameters, IMAGES[:5], rngs=rngs)
    assert largest_difference(wrapped(IMAGES[:5]), expected) < 1e-6


def test_rise_ends_with_a_rest_that_is_padded(wrapped):
    Rise(wrapped, nb_samples=20, grid_size=4, batch_size=8)(IMAGES[:2], TARGETS[:2])
    assert compiled_sizes(wrapped)[0] <= 2


def independent(function, sample=(6,)):
    return cost_per_sample(traced_batch(function, 0.0, sample)) is not None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_samples_of_usual_models_are_independent(name):
    pair = make_pair(name)
    core = pair.wrapped._fused
    batch = traced_batch(core.function, core.leaves(), pair.inputs.shape[1:])
    for of_pullback in (False, True):
        cost = cost_per_sample(batch, of_pullback)
        assert cost is not None
        if core.graph:  # with the submodules' tags
            assert core.graph.cost_per_sample(of_pullback) == cost


def batch_norm(_, x):
    model = nnx.BatchNorm(6, use_running_average=False, rngs=nnx.Rngs(0))
    return model(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: x - x.mean(0),
        lambda _, x: x / jnp.linalg.norm(x),
        lambda _, x: x - x[:1],
        lambda _, x: x[::-1],
        lambda _, x: jnp.roll(x, 1, axis=0),
        lambda _, x: jnp.cumsum(x, axis=0),
        lambda _, x: jnp.sort(x, axis=0),
        lambda _, x: jnp.take_along_axis(x, jnp.argsort(x, 0), 0),
        lambda _, x: jax.lax.top_k(x.T, len(x))[0].T,
        lambda _, x: jax.nn.softmax(x, axis=0),
        lambda _, x: jax.nn.softmax(x @ x.T) @ x,
        lambda _, x: x * jnp.arange(len(x))[:, None],
        lambda _, x: x + jax.random.normal(jax.random.key(0), x.shape),
        lambda _, x: jax.random.permutation(jax.random.key(0), x),
        lambda _, x: jax.lax.scan(lambda c, row: (c + row, c), jnp.zeros(6), x)[1],
        lambda _, x: jax.lax.map(lambda row: row - x.mean(), x),
        lambda _, x: jax.lax.while_loop(lambda y: y.sum() < 1, lambda y: y + 1, x),
        lambda _, x: jax.lax.cond(x.sum() > 0, lambda y: y, lambda y: -y, x),
        lambda _, x: jax.lax.reduce_window(x, -np.inf, jax.lax.max, (3, 1), (1, 1), "SAME"),
        lambda _, x: jax.vmap(lambda v: jnp.convolve(v, jnp.ones(3), "same"), 1, 1)(x),
        lambda _, x: jax.pure_callback(np.cumsum, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
        lambda _, x: x.reshape(3, -1, 6),
        lambda _, x: x.reshape(6, -1).T,
        lambda _, x: jnp.concatenate([x, -x]).reshape(len(x), 2, -1),
        lambda _, x: jnp.concatenate([x, -x])[: len(x)],
        lambda _, x: jnp.concatenate([x, -x]) * jnp.repeat(jnp.stack([x, -x], 1), 6, 0)[::6, 0],
        lambda _, x: x.at[0].multiply(2.0),
        lambda _, x: x.at[0].max(2.0),
        lambda _, x: jnp.fft.fft(x, axis=0).real,
        lambda _, x: jnp.full((len(x), len(x)), 1 / 3) @ x,
        lambda _, x: x / len(x),
        lambda _, x: x * (1 / len(x)),
        lambda _, x: x * np.arange(len(x))[:, None],
        lambda _, x: x + jnp.cumsum(jnp.ones_like(x), axis=0),
        lambda _, x: x / jnp.ones_like(x).sum(0),
        lambda _, x: x + jax.random.poisson(jax.random.key(0), 3.0, x.shape),
        lambda _, x: (
            x
            + jax.lax.map(
                lambda key: jax.random.normal(key, x.shape),
                jax.random.split(jax.random.key(0), 2),
            ).sum(0)
        ),
        lambda _, x: x + jax.random.gamma(jax.random.key(0), 3.0, x.shape),
        lambda _, x: jax.lax.custom_linear_solve(
            lambda y: y * (1 + x.sum()), x, lambda _, b: b / (1 + x.sum())
        ),
        lambda _, x: jax.lax.pad(x, 0.0, [(-1, 1, 0), (0, 0, 0)]),
        batch_norm,
    ],
)
def test_samples_that_are_mixed_are_found(function):
    assert not independent(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: jax.nn.softmax(x),
        lambda _, x: jnp.sort(x, axis=1),
        lambda _, x: jax.vmap(lambda row: row - row.mean())(x),
        lambda _, x: jax.lax.map(lambda row: row @ row * row, x),
        lambda _, x: jnp.ones((9, 3))[x.astype(int)],
        lambda _, x: (x.reshape(-1, 2) @ jnp.ones((2, 3))).reshape(len(x), -1),
        lambda _, x: jax.lax.scan(lambda c, v: (c + v, c), jnp.zeros(len(x)), x.T)[1].T,
        lambda _, x: jax.lax.fori_loop(0, 4, lambda i, y: y * x, x),
        lambda _, x: jax.grad(lambda y: (y**3).sum())(x),
        lambda _, x: x + jax.random.normal(jax.random.key(0), (6,)),
        lambda _, x: jnp.concatenate([x, -x]).reshape(2, -1, 6).sum(0),
        lambda _, x: jax.checkpoint(jax.jit(jax.nn.relu))(x),
        lambda _, x: jnp.concatenate([x, -x], 1).reshape(-1, 6).reshape(len(x), 2, 6)[:, 0],
        lambda _, x: jnp.repeat(x, 3, 0).reshape(len(x), 3, -1).sum(1),
        lambda _, x: jnp.tile(x, (3, 1)).reshape(3, len(x), -1).sum(0),
        lambda _, x: jnp.fft.rfft(x).real,
        lambda _, x: jnp.linalg.cholesky(x[:, :4].reshape(-1, 2, 2)),
        lambda _, x: jax.lax.dynamic_slice_in_dim(x, 2, 3, 1),
        lambda _, x: jax.lax.dynamic_update_slice_in_dim(x, jnp.zeros((len(x), 2)), 2, 1),
        lambda _, x: x + jax.lax.broadcasted_iota("float32", x.shape, 1),
        lambda _, x: jnp.pad(x, ((0, 0), (1, 1))),
        lambda _, x: jnp.split(x, 2, 1)[0],
        lambda _, x: jax.lax.optimization_barrier((x, jnp.ones(3)))[0],
        lambda _, x: jnp.where(x > 0, x, jnp.finfo("float32").min),
    ],
)
def test_samples_that_are_not_mixed_are_found(function):
    assert independent(function)
