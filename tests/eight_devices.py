"""Explanations do not depend on where the parameters are. `test_devices` runs this."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from xplique.attributions import GradCAM, GuidedBackprop, Occlusion, Saliency

from tests.architectures import digits
from tests.compilations import compilations
from tests.equality_table import largest_difference
from xplique_flax import FlaxWrapper, gpu
from xplique_flax.devices import Devices

IMAGES, TARGETS = digits(5)
SHAPE = IMAGES.shape[1:]
METHODS = (
    Saliency,
    GuidedBackprop,
    GradCAM,
    lambda model: Occlusion(model, patch_size=2, patch_stride=2),
)
MESH = jax.make_mesh((8,), ("channels",), axis_types=(AxisType.Auto,))
EXPLICIT = jax.make_mesh((8,), ("channels",), axis_types=(AxisType.Explicit,))


class Net(nn.Module):
    boxed: bool = False
    named: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        if self.boxed:
            init = nn.with_partitioning(init, (None, None, None, "channels"))
        x = nn.relu(nn.Conv(16, (3, 3), kernel_init=init, name="conv")(x))
        if self.named:
            x = jax.lax.with_sharding_constraint(x, P(None, None, None, "channels"))
        return nn.Dense(10, name="last")(x.mean((1, 2)))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(
            1,
            16,
            (3, 3),
            kernel_metadata={"out_sharding": (None, None, None, "channels")},
            rngs=rngs,
        )
        self.last = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.conv(x)).mean((1, 2)))


@pytest.fixture(scope="module")
def parameters():
    assert jax.device_count() == 8
    return Net().init(jax.random.key(0), IMAGES)


def shard(parameters, mesh):
    def place(leaf):
        spec = P(*[None] * (leaf.ndim - 1), "channels") if leaf.shape[-1] == 16 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, parameters)


def same_explanations(wrapped, parameters):
    expected = FlaxWrapper(Net(), jax.device_get(parameters), input_shape=SHAPE)
    for method in METHODS:
        maps = [method(model)(IMAGES, TARGETS) for model in (wrapped, expected)]
        assert largest_difference(*maps) < 1e-5
    features, head = wrapped.split("conv")
    assert largest_difference(head(features(IMAGES)), expected(IMAGES)) < 1e-5


def test_parameters_on_another_device(parameters):
    there = jax.device_put(parameters, jax.devices()[3])
    same_explanations(FlaxWrapper(Net(), there, input_shape=SHAPE), parameters)


def test_sharded_parameters(parameters):
    sharded = shard(parameters, MESH)
    kernel = sharded["params"]["conv"]["kernel"]
    assert len({shard.data.shape for shard in kernel.addressable_shards}) == 1
    assert kernel.addressable_shards[0].data.shape == (3, 3, 1, 2)
    same_explanations(FlaxWrapper(Net(), sharded, input_shape=SHAPE), parameters)


def test_boxed_parameters_have_the_names_of_plain_ones(parameters):
    boxed = Net(boxed=True).init(jax.random.key(0), IMAGES)
    wrapped = FlaxWrapper(Net(boxed=True), boxed, input_shape=SHAPE)
    plain = FlaxWrapper(Net(), parameters, input_shape=SHAPE)
    assert [each.path for each in wrapped.weights] == [each.path for each in plain.weights]
    same_explanations(wrapped, parameters)


def test_mesh_is_that_in_which_the_model_was_wrapped(parameters):
    """TensorFlow calls the model from threads of its own."""
    with jax.set_mesh(MESH):
        wrapped = FlaxWrapper(Net(named=True), shard(parameters, MESH), input_shape=SHAPE)
    same_explanations(wrapped, parameters)


def test_sharded_nnx_module(parameters):
    with jax.set_mesh(MESH):
        net = NNXNet(nnx.Rngs(0))
        assert len(net.conv.kernel[...].sharding.device_set) == 8
        for name, arrays in parameters["params"].items():
            getattr(net, name).kernel[...] = arrays["kernel"]
        wrapped = FlaxWrapper(net, input_shape=SHAPE)
    same_explanations(wrapped, parameters)


def test_parameters_on_different_devices(parameters):
    devices = jax.devices()
    params = {
        name: jax.device_put(leaf, devices[index])
        for index, (name, leaf) in enumerate(sorted(parameters["params"].items()))
    }
    with pytest.raises(ValueError, match=r"on device 0, and .* device 1\..* jax\.device_get"):
        FlaxWrapper(Net(), {"params": params})


def test_explicit_sharding_that_the_model_does_not_know(parameters):
    with pytest.raises(ValueError, match=r"`flax_module` can't be applied.* type Auto"):
        FlaxWrapper(Net(), shard(parameters, EXPLICIT), input_shape=SHAPE)
    gathered = jax.device_get(shard(parameters, EXPLICIT))
    same_explanations(FlaxWrapper(Net(), gathered, input_shape=SHAPE), parameters)


def test_parameters_of_other_processes(parameters, monkeypatch):
    kind = type(parameters["params"]["conv"]["kernel"])
    monkeypatch.setattr(kind, "is_fully_addressable", False)
    with pytest.raises(ValueError, match=r"devices of other processes\..*process_allgather"):
        FlaxWrapper(Net(), parameters)


def test_other_parameters_of_another_place(parameters):
    wrapped = FlaxWrapper(Net(), parameters, input_shape=SHAPE)
    other = jax.tree.map(lambda leaf: np.asarray(leaf) * 1.5, parameters)
    again = wrapped.with_parameters(shard(other, MESH))
    same_explanations(again, other)


@pytest.fixture
def calls(monkeypatch):
    """Note on how many devices each batch is, and how many samples are on each."""
    found = []
    spread = Devices.spread

    def noted(devices, array):
        result = spread(devices, array)
        shards = result.addressable_shards
        found.append((len({shard.device for shard in shards}), shards[0].data.shape[0]))
        return result

    monkeypatch.setattr(Devices, "spread", noted)
    return found


def test_batches_are_spread_over_devices(parameters, calls):
    wrapped = FlaxWrapper(Net(), parameters, input_shape=SHAPE, devices=jax.devices())
    same_explanations(wrapped, parameters)
    assert calls and {count for count, _ in calls} == {8}
    calls.clear()
    GuidedBackprop(wrapped)(IMAGES, TARGETS)
    assert calls and set(calls) == {(8, 1)}
    calls.clear()
    assert largest_difference(wrapped(IMAGES[:3]), Net().apply(parameters, IMAGES[:3])) < 1e-5
    assert calls == [(8, 1)]


def test_other_parameters_are_spread_too(parameters, calls):
    wrapped = FlaxWrapper(Net(), parameters, input_shape=SHAPE, devices=jax.devices()[2:5])
    other = jax.tree.map(lambda leaf: np.asarray(leaf) * 1.5, parameters)
    again = wrapped.with_parameters(other)
    assert all(len(leaf.sharding.device_set) == 3 for leaf in again._fused.leaves())
    same_explanations(again, other)
    assert {count for count, _ in calls} == {3}
    again.set_weights(wrapped.get_weights())
    same_explanations(again, parameters)


def test_dependent_samples_are_not_spread(calls):
    def centered(x):
        return (x - x.mean(0)).reshape(len(x), -1)[:, :10] ** 2

    wrapped = FlaxWrapper.from_function(centered, devices=jax.devices())
    assert largest_difference(wrapped(IMAGES), centered(IMAGES)) < 1e-6
    assert calls == []


def test_spread_batches_of_many_sizes_compile_one(parameters):
    wrapped = FlaxWrapper(Net(), parameters, devices=jax.devices())
    with compilations() as seen:
        for number in range(1, 6):
            wrapped(IMAGES[:number])
        assert (wrapped._fused.compiled.jitted.compilations, len(seen)) == (1, 1)
        Saliency(wrapped)(IMAGES, TARGETS)
        assert len(seen) == 2


def test_devices_of_a_mesh_that_is_set(parameters):
    with jax.set_mesh(MESH), pytest.raises(ValueError, match=r"`devices` is \[.*a mesh is set"):
        FlaxWrapper(Net(), parameters, devices=jax.devices())


def test_devices_of_other_processes(parameters, monkeypatch):
    devices = jax.devices()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match=r"`devices` is .* belong to other processes.*Accepted"):
        FlaxWrapper(Net(), parameters, devices=devices)


@pytest.mark.parametrize("method", [Saliency, GradCAM])
@pytest.mark.parametrize("places", ["all", "fourth"])
def test_tensors_on_a_gpu_go_to_where_the_parameters_are(method, places, parameters, monkeypatch):
    expected = method(FlaxWrapper(Net(), parameters, input_shape=SHAPE))(IMAGES, TARGETS)
    monkeypatch.setattr(gpu, "_KIND", "CPU")  # which stands for one
    if places == "all":
        wrapped = FlaxWrapper(Net(), parameters, input_shape=SHAPE, devices=jax.devices())
    else:
        there = jax.device_put(parameters, jax.devices()[3])
        wrapped = FlaxWrapper(Net(), there, input_shape=SHAPE)
    assert largest_difference(method(wrapped)(IMAGES, TARGETS), expected) < 1e-6
