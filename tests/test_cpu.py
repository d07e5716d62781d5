"""What is computed in another way on a CPU is the same."""

import gc
import platform
import subprocess
import sys
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorflow.compiler.xla.service import hlo_pb2

from benchmarks.alone import memory
from tests.compilations import compilations
from tests.required import missing
from xplique_flax import cpu, onednn

RNG = np.random.default_rng(0)


def traced(compiled, *arrays, parameters=None):
    """Return what is given to XLA, as JAX has traced it."""
    compiled(parameters, *arrays)
    shapes = tuple(array.shape for array in arrays)
    if shapes not in compiled._programs:
        return compiled._traced.trace(parameters, *arrays)
    program = compiled._programs[shapes]
    calls = mock.Mock(wraps=program.jitted)
    with mock.patch.dict(compiled._programs, {shapes: program._replace(jitted=calls)}):
        compiled(parameters, *arrays)
    return program.jitted.trace(*calls.call_args.args)


def given_to_xla(compiled, *arrays, parameters=None):
    """Return the jaxpr of what is given to XLA, as a text."""
    return str(traced(compiled, *arrays, parameters=parameters).jaxpr)


def is_known(option, value):
    """Return whether this version of XLA has an option."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def is_left_to_xla(primitive, compiled, *arrays, parameters=None):
    """Return whether a primitive is in what is given to XLA."""
    return f" {primitive}[" in given_to_xla(compiled, *arrays, parameters=parameters)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_max_pooling_is_found_inside_of_calls(wrap):
    pool = wrap(lambda x: nn.max_pool(x, (2, 2), (2, 2)))

    def gradient(_, x):
        return jax.grad(lambda y: (pool(y) ** 2).sum())(x)

    images = jnp.array(RNG.normal(size=(2, 4, 4, 1)), "float32")
    compiled = cpu.Compiled(gradient)
    assert not is_left_to_xla("select_and_scatter_add", compiled, images)
    np.testing.assert_allclose(compiled(None, images), gradient(None, images), rtol=1e-6)


def test_nothing_is_replaced_on_other_devices(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def gradient(_, x):
        return jax.grad(lambda y: (nn.max_pool(y, (2, 2), (2, 2)) ** 2).sum())(x)

    images = np.ones((2, 4, 4, 1), "float32")
    assert is_left_to_xla("select_and_scatter_add", cpu.Compiled(gradient), images)


CONVOLUTIONS = {
    "plain": nn.Conv(5, (3, 3)),
    "strided": nn.Conv(5, (3, 2), (2, 1)),
    "pointwise": nn.Conv(5, (1, 1), (2, 2), "VALID"),
    "dilated": nn.Conv(5, (3, 3), kernel_dilation=2),
    "transposed": nn.ConvTranspose(5, (3, 3), (2, 2)),
    "grouped": nn.Conv(6, (3, 3), feature_group_count=3),
    "half": nn.Conv(5, (3, 3), dtype="bfloat16"),
    "in time": nn.Conv(5, (3,)),
}
FLIPPED = {"plain", "strided", "pointwise", "dilated", "transposed", "in time"}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_kernels_are_flipped_once_and_gradients_are_the_same(name):
    module = CONVOLUTIONS[name]
    images = jnp.array(RNG.normal(size=(2, 7, 3) if name == "in time" else (2, 7, 8, 3)), "float32")
    parameters = module.init(jax.random.key(0), images)

    def gradient(parameters, x):
        return jax.grad(lambda y: (module.apply(parameters, y) ** 2).sum())(x)

    compiled = cpu.Compiled(gradient)
    first = compiled(parameters, images)
    kernel = parameters["params"]["kernel"]
    kept = [key for key in cpu._kept if key[0] == id(kernel)]
    assert len(kept) == (name in FLIPPED)
    again = compiled(parameters, images[:1])
    assert [key for key in cpu._kept if key[0] == id(kernel)] == kept
    tolerance = 0.05 if name == "half" else 1e-4
    expected = jax.jit(gradient)(parameters, images)
    np.testing.assert_allclose(first, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(again, expected[:1], rtol=tolerance, atol=tolerance)


def test_operations_without_results_stay():
    module, images, called = nn.Conv(5, (3, 3)), np.ones((1, 6, 6, 2), "float32"), []
    parameters = module.init(jax.random.key(0), images)

    def gradient(parameters, x):
        jax.debug.callback(lambda: called.append(True))
        return jax.grad(lambda y: module.apply(parameters, y).sum())(x)

    given = cpu.Compiled(gradient)(parameters, images)
    jax.effects_barrier()
    assert called == [True]
    np.testing.assert_allclose(given, gradient(parameters, images), rtol=1e-5, atol=1e-6)


def test_flipped_kernels_follow_the_parameters_and_leave_with_them():
    module, images = nn.Conv(5, (3, 3)), np.ones((1, 6, 6, 2), "float32")

    def gradient(parameters, x):
        return jax.grad(lambda y: module.apply(parameters, y).sum())(x)

    compiled = cpu.Compiled(gradient)
    before = len(cpu._kept)
    for seed in range(3):
        parameters = module.init(jax.random.key(seed), images)
        given = compiled(parameters, images)
        np.testing.assert_allclose(given, gradient(parameters, images), rtol=1e-5, atol=1e-6)
    assert len(cpu._kept) <= before + 3
    del parameters
    gc.collect()
    assert len(cpu._kept) <= before


@pytest.mark.parametrize("axes", [(1,), (0, 1), (0, 1, 2)])
def test_model_may_flip_a_kernel_itself(axes):
    kernel = jnp.array(np.random.default_rng(0).normal(size=(3, 3, 4, 4)), "float32")
    images = jnp.array(np.random.default_rng(1).normal(size=(2, 9, 9, 4)), "float32")

    def convolve(kernel, x):
        flipped = jax.lax.rev(kernel, axes)
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, flipped, (1, 1), "SAME", dimension_numbers=layout)

    given = cpu.Compiled(convolve)(kernel, images)
    np.testing.assert_allclose(given, convolve(kernel, images), atol=1e-4)


def test_kernel_is_flipped_without_compiling():
    kernel = jnp.array(RNG.normal(size=(3, 2, 4, 5)), "float32")
    with compilations() as seen:
        flipped = cpu._flipped(kernel, (0, 1))
    assert seen == []
    np.testing.assert_array_equal(flipped, np.asarray(kernel)[::-1, ::-1].transpose(0, 1, 3, 2))


@pytest.mark.parametrize("device", [None, jax.devices()[0]])
def test_compiles_once_and_before_kernels_are_flipped(device, monkeypatch):
    images = RNG.normal(size=(1, 6, 6, 2)).astype("float32")
    module = nn.Conv(5, (3, 3))
    # On a device of their own choice, JAX takes arrays for others than those without one.
    parameters = jax.device_put(module.init(jax.random.key(0), images), device)

    def gradient(parameters, x):
        return jax.grad(lambda y: module.apply(parameters, y).sum())(x)

    steps = []
    flip, release = cpu._flipped, cpu._release_memory
    compiled = cpu.Compiled(gradient)
    with compilations() as seen:

        def noted(name, function):
            def call(*args):
                steps.append((name, len(seen)))
                return function(*args)

            return call

        monkeypatch.setattr(cpu, "_flipped", noted("flip", flip))
        monkeypatch.setattr(cpu, "_release_memory", noted("release", release))
        compiled(parameters, images)
        assert steps == [("release", 1), ("flip", 1)]
        compiled(parameters, images)
        assert steps == [("release", 1), ("flip", 1), ("flip", 1)]
        assert len(seen) == 1


def test_memory_that_was_freed_is_given_back():
    if platform.libc_ver()[0] != "glibc":
        missing("The GNU C library")
    blocks = [bytes(50_000) + b"1" for _ in range(2_000)]
    before = memory("VmRSS")
    # What is kept in between is why the C library does not give the rest back by itself.
    blocks = blocks[::100]
    kept = memory("VmRSS")
    cpu._release_memory()
    assert before - kept < 20
    assert before - memory("VmRSS") > 60


@pytest.mark.parametrize(
    ("system", "functions", "calls"),
    [
        ("linux", ["malloc_trim"], [mock.call.malloc_trim(0)]),
        ("linux", [], []),
        ("darwin", ["malloc_trim"], []),
    ],
)
def test_other_c_libraries_are_left_alone(system, functions, calls, monkeypatch):
    library = mock.Mock(spec=functions)
    monkeypatch.setattr(cpu.sys, "platform", system)
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: library)
    cpu._release_memory()
    assert library.mock_calls == calls


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(nn.RNN(nn.OptimizedLSTMCell(16))(x)[:, -1])


def rows(samples):
    return samples.reshape(len(samples), -1)


@pytest.mark.parametrize(
    ("module", "shape", "has_wide_vectors", "is_fused"),
    [
        (Recurrent(), (16, 6, 16), True, True),
        (Recurrent(), (128, 6, 16), True, True),
        (nn.Dense(16), (127, 96), True, True),
        (nn.Dense(16), (128, 96), True, False),
        (nn.Dense(16), (128, 96), False, True),
        (nn.Dense(16), (16, 6, 16), False, False),
        (nn.Sequential([nn.Conv(4, (3,)), rows, nn.Dense(16)]), (16, 6, 16), False, False),
    ],
)
def test_products_are_fused_for_ynn_in_loops_and_perceptrons_alone(
    module, shape, has_wide_vectors, is_fused, monkeypatch
):
    if not is_known(cpu._FUSIONS, ""):
        missing("A version of XLA with YNN")
    monkeypatch.setattr(onednn, "has_wide_vectors", lambda: has_wide_vectors)
    series = jnp.array(RNG.normal(size=shape), "float32")
    parameters = module.init(jax.random.key(0), series)

    def gradient(parameters, x):
        return jax.grad(lambda y: (module.apply(parameters, y) ** 2).sum())(x)

    compiled = cpu.Compiled(gradient)
    np.testing.assert_allclose(
        compiled(parameters, series), jax.jit(gradient)(parameters, series), rtol=1e-4, atol=1e-5
    )
    executable = traced(compiled, series, parameters=parameters).lower().compile()
    assert ("ynn_fusion" in executable.as_text()) == is_fused
    assert compiled.compilations == 1


def test_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(cpu, "_FUSIONS", "xla_no_such_option")
    monkeypatch.setattr(cpu, "_unknown", set())
    compiled = cpu.Compiled(lambda _, x: x + 1)
    assert compiled(None, np.float32(1)) == 2
    assert cpu._unknown == {"xla_no_such_option"}
    assert compiled(None, np.ones(3, "float32")).tolist() == [2, 2, 2]
    assert compiled.compilations == 2


def test_other_errors_of_xla_are_raised(monkeypatch):
    exhausted = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    monkeypatch.setattr(jax.stages.Lowered, "compile", mock.Mock(side_effect=exhausted))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        cpu.Compiled(lambda _, x: x + 1)(None, np.float32(1))


def test_arrays_of_more_than_two_gigabytes_compile():
    large = jax.ShapeDtypeStruct((2**29,), "float32")
    options = cpu._options(jax.make_jaxpr(jnp.exp)(large).jaxpr, is_gradient=False)
    assert jax.jit(jnp.exp, compiler_options=options).lower(large).compile()


def normalized(x):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def with_softmax_at_the_end(x):
    for _ in range(20):
        x = nn.relu(x)
    return nn.softmax(x[:, :8])


def depthwise(x):
    kernel = jnp.full((3, 3, 1, 4), 0.5)
    y = jax.lax.conv_general_dilated(
        nn.relu(x).reshape(-1, 4, 4, 4),
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    return nn.relu(y)


def recurrent(x):
    y = with_softmax_at_the_end(x)
    step = jnp.eye(8) / 2
    return jax.lax.scan(lambda y, _: (jnp.tanh(y @ step), None), y, length=3)[0]


def softplus_in_a_call(x):
    return jax.checkpoint(nn.softplus)(x)


@pytest.mark.parametrize(
    ("activation", "is_gradient", "is_compiled_by_older_way"),
    [
        (nn.relu, True, True),
        (normalized, True, True),
        (with_softmax_at_the_end, True, True),
        (nn.relu, False, False),
        (depthwise, True, False),
        (recurrent, True, False),
        (nn.silu, True, False),
        (nn.gelu, True, False),
        (nn.softmax, True, False),
        (softplus_in_a_call, True, False),
    ],
)
def test_gradients_of_few_transcendental_functions_are_compiled_with_less_memory(
    activation, is_gradient, is_compiled_by_older_way, monkeypatch, tmp_path
):
    if not is_known(cpu._EMITTERS, False):
        missing("A version of XLA with two ways to generate code")
    options = cpu._options
    monkeypatch.setattr(
        cpu, "_options", lambda *args, **kwargs: {**options(*args, **kwargs), **dump}
    )
    dump = {"xla_dump_to": str(tmp_path)}

    def function(_, x, upstream):
        return jax.vjp(activation, x)[1](upstream)

    x = jnp.array(RNG.normal(size=(8, 64)), "float32")
    upstream = jnp.array(RNG.normal(size=activation(x).shape), "float32")
    given = cpu.Compiled(function, cotangents=int(is_gradient))(None, x, upstream)
    np.testing.assert_allclose(given, function(None, x, upstream), rtol=1e-5, atol=1e-6)
    # The newer way makes a module of its own of each fusion.
    assert any(tmp_path.iterdir())
    assert (not any(tmp_path.glob("*fusion*_kernel_module*"))) == is_compiled_by_older_way


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(8):
            x = nn.silu(nn.Conv(16, (3, 3))(x))
        return x.sum()


def deep_gradient(parameters, x):
    return jax.grad(lambda y: Deep().apply(parameters, y))(x)


def heaps_of(compiled, images, parameters):
    """Return the sizes of the pieces of memory that XLA asks for in each call."""
    executable = traced(compiled, images, parameters=parameters).lower().compile()
    assignment = hlo_pb2.BufferAssignmentProto.FromString(
        executable.memory_analysis().serialized_buffer_assignment_proto
    )
    return [
        allocation.size
        for allocation in assignment.buffer_allocations
        if not (
            allocation.is_entry_computation_parameter
            or allocation.is_constant
            or allocation.is_thread_local
            or allocation.maybe_live_out
        )
    ]


@pytest.mark.parametrize(("size", "largest"), [(224, 30 * 2**20), (768, 1.3 * 768 * 768 * 16 * 4)])
def test_memory_is_asked_for_in_pieces_that_hold_the_largest_array(size, largest, capfd):
    if not is_known(cpu._HEAPS, cpu._HEAP):
        missing("A version of XLA that asks for memory in pieces")
    images = jnp.ones((1, size, size, 3))
    parameters = Deep().init(jax.random.key(0), images)
    heaps = heaps_of(cpu.Compiled(deep_gradient), images, parameters)
    assert max(heaps) <= largest
    assert "per-heap" not in capfd.readouterr().err
    whole = jax.jit(deep_gradient).lower(parameters, images).compile().memory_analysis()
    assert whole.temp_size_in_bytes > 30 * 2**20


FAULTS = """
import resource
from xplique_flax import cpu

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        pieces = [bytearray(20 * 2**20) for _ in range(2)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
without = faults()
cpu._keep_memory()
faults()
print(without, faults())
"""


HEAP_FAULTS = """
import ctypes
import resource
import threading

from xplique_flax import cpu

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = (ctypes.c_void_p,)
SIZE = 20 * 2**20

def faults():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(5):
        piece = library.malloc(SIZE)
        ctypes.memset(piece, 1, SIZE)
        library.free(piece)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

def count():
    # A thread's heaps are at multiples of 64 MiB. The first of them begins with its bookkeeping.
    while (piece := library.malloc(SIZE)) % 2**26 > 256:
        pass
    library.free(piece)
    faults()
    print(faults())

for keep in (lambda: bytearray(31 * 2**20), cpu._keep_memory):
    keep()
    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
"""


@pytest.mark.parametrize("script", [FAULTS, HEAP_FAULTS], ids=["large", "in_a_heap_of_its_own"])
def test_c_library_keeps_memory_from_one_call_to_the_next(script):
    if platform.libc_ver()[0] != "glibc":
        missing("The GNU C library")
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    without, kept = map(int, ran.stdout.split())
    assert kept < without / 10
