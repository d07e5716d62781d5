"""Convolutions that oneDNN computes are the same; the others are left to XLA."""

import platform
import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxlib import version

from tests.test_cpu import is_left_to_xla, traced
from xplique_flax import cpu, onednn

RNG = np.random.default_rng(0)
PINS = Path(__file__).parent.parent / "requirements-cpu.txt"
# Elsewhere, what oneDNN would compute is left to XLA as well, and has to be the same too.
USABLE = onednn.is_usable()
SIZES = {1: (1100,), 2: (64, 33), 3: (7, 8, 6)}
COMPUTED = {
    "square": nn.Conv(8, (3, 3)),
    "wide": nn.Conv(5, (1, 4)),
    "strided": nn.Conv(8, (3, 3), (2, 1)),
    "padded": nn.Conv(8, (3, 2), padding=((0, 3), (1, 0))),
    "valid": nn.Conv(8, (5, 5), padding="VALID"),
    "dilated": nn.Conv(8, (3, 3), kernel_dilation=(2, 3)),
    "grouped": nn.Conv(8, (3, 3), feature_group_count=2),
    "multiplied": nn.Conv(12, (3, 3), feature_group_count=4),
    "strided groups": nn.Conv(8, (3, 3), (2, 1), feature_group_count=2),
    "depthwise": nn.Conv(4, (3, 3), feature_group_count=4),
    "strided depthwise": nn.Conv(4, (3, 3), (2, 1), feature_group_count=4),
    "series": nn.Conv(8, (5,)),
    "volume": nn.Conv(8, (3, 3, 3)),
    "expanded": nn.Conv(256, (1, 1)),
}
LEFT = {
    "pointwise": nn.Conv(8, (1, 1)),
    "expanded with strides": nn.Conv(1024, (1, 1), (2, 2)),
    "expanded groups": nn.Conv(256, (1, 1), feature_group_count=2),
    "expanded series": nn.Conv(512, (1,)),
    "patches": nn.Conv(8, (2, 2), (2, 2)),
    "gaps": nn.Conv(8, (2, 2), (3, 3)),
    "half": nn.Conv(8, (3, 3), dtype="bfloat16"),
    "cropped": nn.Conv(8, (3, 3), padding=((-1, 1), (1, 1))),
    "tiny": nn.Conv(8, (60, 30), padding="VALID"),
}


def model(module):
    images = jnp.array(RNG.normal(size=(2, *SIZES[len(module.kernel_size)], 4)), "float32")
    return images, module.init(jax.random.key(0), images)


def test_onednn_is_called_with_the_pinned_version():
    pinned = re.search(r"^jaxlib==(\S+)", PINS.read_text("utf-8"), re.MULTILINE)[1]
    assert pinned in onednn._VERSIONS
    here = version.__version__, sys.platform, platform.machine()
    if here == (pinned, "linux", "x86_64"):
        assert USABLE


@pytest.mark.parametrize("name", COMPUTED)
def test_convolution_is_the_same(name):
    images, parameters = model(COMPUTED[name])

    def apply(_, x):
        return COMPUTED[name].apply(parameters, x)

    compiled = cpu.Compiled(apply)
    assert is_left_to_xla("conv_general_dilated", compiled, images) != USABLE
    expected = jax.jit(apply)(None, images)
    np.testing.assert_allclose(compiled(None, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in COMPUTED if n not in ("padded", "expanded")])
def test_gradient_is_the_same(name):
    images, parameters = model(COMPUTED[name])

    def gradient(parameters, x):
        return jax.grad(lambda y: (COMPUTED[name].apply(parameters, y) ** 2).sum())(x)

    compiled = cpu.Compiled(gradient)
    assert is_left_to_xla("conv_general_dilated", compiled, images, parameters=parameters) != USABLE
    expected = jax.jit(gradient)(parameters, images)
    given = compiled(parameters, images)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5 * jnp.abs(expected).max())


@pytest.mark.parametrize("name", LEFT)
def test_other_convolutions_are_left_to_xla(name):
    images, parameters = model(LEFT[name])
    compiled = cpu.Compiled(lambda _, x: LEFT[name].apply(parameters, x))
    assert is_left_to_xla("conv_general_dilated", compiled, images)
    expected = LEFT[name].apply(parameters, images)
    np.testing.assert_allclose(compiled(None, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "places", "channels", "groups", "is_computed"),
    [
        (1, 2**11 - 1, 16, 1, False),
        (1, 2**11, 16, 1, True),
        (1, 2**14 - 1, 17, 1, False),
        (1, 2**14, 17, 1, True),
        (2, 2**11 - 1, 8, 1, False),
        (2, 2**11, 8, 1, True),
        (2, 128, 120, 1, False),
        (2, 128, 128, 1, True),
        (2, 63, 512, 1, False),
        (2, 63, 8, 8, False),
        (2, 64, 8, 8, True),
        (3, 63, 8, 1, False),
        (3, 64, 8, 1, True),
    ],
)
def test_small_convolutions_are_left_to_xla(rank, places, channels, groups, is_computed):
    kernel = np.ones((*(3,) * rank, channels // groups, channels), "float32")
    images = np.ones((1, places, *(1,) * (rank - 1), channels), "float32")
    last = channels_last(rank + 2)
    numbers = lax.ConvDimensionNumbers(last, (rank + 1, rank, *range(rank)), last)
    result = onednn.convolution(
        images,
        kernel,
        window_strides=(1,) * rank,
        padding=((1, 1),) * rank,
        rhs_dilation=(1,) * rank,
        dimension_numbers=numbers,
        feature_group_count=groups,
    )
    assert (result is not NotImplemented) == (is_computed and USABLE)


@pytest.mark.parametrize(
    ("places", "outputs", "is_computed"),
    [(2**16, 16, True), (2**16 - 1, 16, False), (2**17, 15, False)],
)
def test_products_with_few_outputs_are_left_to_xla(places, outputs, is_computed):
    convolve = nn.Conv(outputs, (1, 1))
    images = jnp.array(RNG.normal(size=(1, places, 1, 4)), "float32")
    parameters = convolve.init(jax.random.key(0), images)
    compiled = cpu.Compiled(convolve.apply)
    is_left = is_left_to_xla("conv_general_dilated", compiled, images, parameters=parameters)
    assert is_left != (is_computed and USABLE)


class Shortcut(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = nn.Conv(64, (1, 1))(nn.tanh(x))
        return nn.relu(nn.Conv(64, (1, 1))(x) + inner).mean((1, 2))


@pytest.mark.parametrize("places", [64, 56])
def test_sum_of_large_products_is_written_in_the_place_of_one(places):
    images = jnp.array(RNG.normal(size=(4, places, 64, 16)), "float32")
    parameters = Shortcut().init(jax.random.key(0), images)
    compiled = cpu.Compiled(Shortcut().apply)
    executable = traced(compiled, images, parameters=parameters).lower().compile()
    product = 4 * images.nbytes
    arrays = executable.memory_analysis().temp_size_in_bytes // product
    assert arrays == (2 if places == 64 and USABLE else 3)
    np.testing.assert_allclose(
        compiled(parameters, images), Shortcut().apply(parameters, images), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "numbers", [("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NCHW"), ("NCHW", "HWIO", "NHWC")]
)
def test_other_layouts_are_left_to_xla(numbers):
    images, kernel = np.ones((9, 9, 9, 9), "float32"), np.ones((3, 3, 9, 9), "float32")
    if numbers[1] == "OIHW":
        kernel = np.ones((9, 9, 3, 3), "float32")

    def convolve(_, x):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    assert is_left_to_xla("conv_general_dilated", cpu.Compiled(convolve), images)


def channels_last(rank):
    return (0, rank - 1, *range(1, rank - 1))


@pytest.mark.parametrize("rank", [2, 6])
def test_other_numbers_of_dimensions_are_left_to_xla(rank):
    images = jnp.array(RNG.normal(size=(70, *(4,) * (rank - 2), 3)), "float32")
    kernel = jnp.array(RNG.normal(size=((2,) * (rank - 2) + (3, 2))), "float32")
    last = channels_last(rank)
    numbers = lax.ConvDimensionNumbers(last, (rank - 1, rank - 2, *range(rank - 2)), last)

    def convolve(_, x):
        return lax.conv_general_dilated(
            x, kernel, (1,) * (rank - 2), "SAME", dimension_numbers=numbers
        )

    compiled = cpu.Compiled(convolve)
    assert is_left_to_xla("conv_general_dilated", compiled, images)
    np.testing.assert_allclose(
        compiled(None, images), jax.jit(convolve)(None, images), rtol=1e-4, atol=1e-5
    )


def test_convolution_without_outputs_is_left_to_xla():
    images, kernel = np.ones((70, 8, 3), "float32"), np.ones((3, 3, 0), "float32")

    def convolve(_, x):
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    compiled = cpu.Compiled(convolve)
    assert is_left_to_xla("conv_general_dilated", compiled, images)
    assert compiled(None, images).shape == (70, 8, 0)


def test_empty_batch_is_left_to_xla():
    images, parameters = model(COMPUTED["square"])
    compiled = cpu.Compiled(lambda _, x: COMPUTED["square"].apply(parameters, x))
    assert compiled(None, images[:0]).shape == (0, 64, 33, 8)


@pytest.mark.parametrize("name", ["square", "grouped", "series", "volume"])
def test_kernel_may_be_stored_in_another_order(name):
    images, parameters = model(COMPUTED[name])
    kernel = jnp.swapaxes(parameters["params"]["kernel"], -1, -2)
    rank, size = images.ndim, images.shape[-1]
    last = channels_last(rank)
    numbers = lax.ConvDimensionNumbers(last, (rank - 2, rank - 1, *range(rank - 2)), last)

    def convolve(_, x):
        ones = (1,) * (rank - 2)
        groups = size // kernel.shape[-1]
        return lax.conv_general_dilated(
            x, kernel, ones, "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    compiled = cpu.Compiled(convolve)
    assert is_left_to_xla("conv_general_dilated", compiled, images) != USABLE
    np.testing.assert_allclose(
        compiled(None, images), jax.jit(convolve)(None, images), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (version, "__version__", "0.9.9"),
        (sys, "platform", "darwin"),
        (platform, "machine", lambda: "aarch64"),
        (jax, "local_device_count", lambda: 2),
    ],
)
def test_onednn_is_not_called_elsewhere(monkeypatch, where, name, value):
    images, parameters = model(COMPUTED["square"])
    compiled = cpu.Compiled(lambda _, x: COMPUTED["square"].apply(parameters, x))
    monkeypatch.setattr(where, name, value)
    assert is_left_to_xla("conv_general_dilated", compiled, images)


def test_onednn_is_not_called_where_compiled_code_is_kept(tmp_path):
    images, parameters = model(COMPUTED["square"])
    compiled = cpu.Compiled(lambda _, x: COMPUTED["square"].apply(parameters, x))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        assert is_left_to_xla("conv_general_dilated", compiled, images)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


@pytest.mark.parametrize(("flags", "is_wide"), [("avx2 avx512f", True), ("avx avx2", False)])
def test_wide_vectors_are_among_what_linux_says_of_the_processor(monkeypatch, flags, is_wide):
    monkeypatch.setattr(Path, "read_text", lambda *_: f"processor : 0\nflags : fpu {flags} bmi\n")
    monkeypatch.setattr(Path, "exists", lambda *_: True)
    assert onednn.has_wide_vectors.__wrapped__() == is_wide
    monkeypatch.setattr(Path, "exists", lambda *_: False)
    assert not onednn.has_wide_vectors.__wrapped__()
