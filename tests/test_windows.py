"""What is computed for each place in a window is the same; other windows are left to XLA."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.test_cpu import given_to_xla, is_left_to_xla, traced
from xplique_flax import cpu, onednn

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((2, 2), (2, 2), "VALID"),
        ((3, 3), (2, 2), ((1, 1), (1, 1))),
        ((3, 3), (1, 1), "SAME"),
        ((2, 2), (3, 3), "VALID"),
        ((2, 3), (1, 2), "SAME"),
        ((1, 1), (2, 2), "VALID"),
    ],
)
def test_gradient_of_max_pooling_goes_to_the_first_maximum(window, strides, padding, dtype):
    # Rounded and cut at zero, many windows have several maxima.
    images = jnp.maximum(jnp.round(jnp.array(RNG.normal(size=(2, 9, 10, 3))), 1), 0).astype(dtype)

    def pool(x):
        return nn.max_pool(x, window, strides, padding)

    upstream = jnp.array(RNG.normal(size=pool(images).shape), dtype)

    def gradient(_, x, upstream):
        return jax.vjp(pool, x)[1](upstream)[0]

    expected = jax.jit(gradient)(None, images, upstream)
    given = cpu.Compiled(gradient)(None, images, upstream)
    assert (given.shape, given.dtype) == (expected.shape, expected.dtype)
    # Where windows overlap, sums may be taken in another order.
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    np.testing.assert_allclose(
        *(np.asarray(a, "float32") for a in (given, expected)), atol=tolerance
    )


def test_gradient_of_min_pooling_goes_to_the_first_minimum():
    images = jnp.round(jnp.array(RNG.normal(size=(2, 9, 10, 3)), "float32"), 1)

    def gradient(_, x):
        return jax.grad(lambda y: (nn.pooling.min_pool(y, (3, 3), (2, 2)) ** 2).sum())(x)

    given, expected = cpu.Compiled(gradient)(None, images), gradient(None, images)
    np.testing.assert_allclose(given, expected, atol=1e-5)


def gradient_of_max_pooling(_, x):
    return jax.grad(lambda y: nn.max_pool(y, (3, 3), (2, 2), ((1, 1), (1, 1))).sum())(x)


def test_maxima_are_found_before_their_gradients():
    """Or XLA would find each of them anew for each number that it may be the source of."""
    images = jnp.array(RNG.normal(size=(2, 9, 10, 3)), "float32")
    compiled = cpu.Compiled(gradient_of_max_pooling)
    executable = traced(compiled, images).lower().compile()
    assert executable.as_text().count(" call(") == 1


def test_gradient_of_max_pooling_has_no_call_with_several_devices(monkeypatch):
    images = jnp.array(RNG.normal(size=(2, 9, 10, 3)), "float32")
    expected = cpu.Compiled(gradient_of_max_pooling)(None, images)
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    compiled = cpu.Compiled(gradient_of_max_pooling)
    assert "name=same" not in given_to_xla(compiled, images)
    np.testing.assert_array_equal(compiled(None, images), expected)


def test_gradient_of_max_pooling_of_nothing():
    images = jnp.zeros((0, 9, 10, 3))
    assert cpu.Compiled(gradient_of_max_pooling)(None, images).shape == images.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [((2, 2), (2, 2), "VALID"), ((3, 3), (2, 2), ((1, 1), (0, 1))), ((2, 3), (1, 2), "SAME")],
)
def test_max_pooling_is_the_same(window, strides, padding, dtype):
    images = jnp.array(RNG.normal(size=(2, 9, 10, 3)), dtype).at[0, 3, 4].set(jnp.nan)

    def pool(_, x):
        return nn.max_pool(x, window, strides, padding)

    compiled = cpu.Compiled(pool)
    assert not is_left_to_xla("reduce_window_max", compiled, images)
    given, expected = (np.asarray(f(None, images), "float32") for f in (compiled, pool))
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: nn.max_pool(x, (6, 6)),
        lambda x: jax.lax.reduce_window(
            x, -np.inf, jax.lax.max, (1, 2, 2, 1), (1,) * 4, "VALID", window_dilation=(1, 2, 1, 1)
        ),
        lambda x: jax.lax.reduce_window(
            x.astype(int), np.iinfo("int32").min, jax.lax.max, (1, 2, 2, 1), (1,) * 4, "VALID"
        ),
    ],
    ids=["large", "dilated", "integers"],
)
def test_other_pooling_is_left_to_xla(pool):
    images = jnp.array(RNG.normal(size=(2, 6, 6, 1)), "float32")
    compiled = cpu.Compiled(lambda _, x: pool(x))
    assert is_left_to_xla("reduce_window_max", compiled, images)
    np.testing.assert_array_equal(compiled(None, images), pool(images))


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((2, 2), (2, 2), "VALID"),
        ((3, 3), (2, 2), ((1, 1), (0, 1))),
        ((3, 3), (1, 1), "SAME"),
        ((2, 3), (1, 2), "SAME"),
        ((2, 2), (3, 3), "VALID"),
    ],
)
def test_average_pooling_and_its_gradient_are_the_same(window, strides, padding, count_include_pad):
    images = jnp.array(RNG.normal(size=(2, 9, 10, 3)), "float32").at[0, 3, 4].set(jnp.inf)

    def pool(_, x):
        return nn.avg_pool(x, window, strides, padding, count_include_pad)

    upstream = jnp.array(RNG.normal(size=pool(None, images).shape), "float32")

    def gradient(_, x, upstream):
        return jax.vjp(lambda y: pool(None, y), x)[1](upstream)[0]

    for function, arrays in ((pool, [images]), (gradient, [images, upstream])):
        compiled = cpu.Compiled(function)
        assert not is_left_to_xla("reduce_window_sum", compiled, *arrays)
        given, expected = compiled(None, *arrays), function(None, *arrays)
        np.testing.assert_allclose(given, expected, rtol=1e-6, atol=1e-6)
    assert np.isinf(pool(None, images)).any()


def test_gradient_of_global_average_pooling_is_repeated():
    images = jnp.array(RNG.normal(size=(2, 7, 8, 3)), "float32")

    def gradient(_, x):
        return jax.grad(lambda y: (x * nn.avg_pool(y, (7, 8))).sum())(x)

    compiled = cpu.Compiled(gradient)
    assert given_to_xla(compiled, images).count("reduce_window_sum") == 1  # for what is not read
    np.testing.assert_allclose(compiled(None, images), gradient(None, images), rtol=1e-6)


@pytest.mark.parametrize(
    ("pad", "value", "window"),
    [
        ((1, 1, 1), 0.0, {}),
        ((1, 2, 1), 0.0, {}),
        ((0, 1, 1), 0.0, {}),
        ((1, 1, 1), 1.0, {}),
        ((1, -1, 1), 0.0, {}),
        ((1, 1, 1), 0.0, {"window_strides": (1, 2, 1, 1)}),
        ((1, 1, 1), 0.0, {"window_dilation": (1, 2, 1, 1)}),
        ((1, 1, 1), 0.0, {"padding": ((0, 0), (1, 0), (0, 0), (0, 0))}),
        ((1, 1, 0), 0.0, {"base_dilation": (1, 2, 1, 1)}),
    ],
)
def test_sum_of_numbers_with_zeros_between_them_is_the_same(pad, value, window):
    images = jnp.array(RNG.normal(size=(2, 5, 5, 3)), "float32")
    arguments = {"window_strides": (1,) * 4, "padding": "VALID"} | window

    def pool(_, x):
        padded = lax.pad(x, value, [(0, 0, 0), pad, pad, (0, 0, 0)])
        return lax.reduce_window(padded, 0.0, lax.add, (1, 2, 2, 1), **arguments)

    given, expected = cpu.Compiled(pool)(None, images), pool(None, images)
    np.testing.assert_allclose(given, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: nn.avg_pool(x, (6, 6)),
        lambda x: nn.avg_pool(x.astype("bfloat16"), (2, 2)),
        lambda x: lax.reduce_window(
            (9 * x).astype(int), 0, lax.add, (1, 2, 2, 1), (1,) * 4, "SAME"
        ),
        lambda x: lax.reduce_window(
            x, 0.0, lax.add, (1, 2, 2, 1), (1,) * 4, "VALID", window_dilation=(1, 2, 1, 1)
        ),
    ],
    ids=["large", "half", "integers", "dilated"],
)
def test_other_sums_are_left_to_xla(pool):
    images = jnp.array(RNG.normal(size=(2, 6, 6, 1)), "float32")
    compiled = cpu.Compiled(lambda _, x: pool(x))
    assert is_left_to_xla("reduce_window_sum", compiled, images)
    np.testing.assert_allclose(
        *(np.asarray(f(images), "float32") for f in (lambda x: compiled(None, x), pool)), rtol=1e-6
    )


@pytest.mark.parametrize("pool", [nn.max_pool, nn.avg_pool])
@pytest.mark.parametrize(("channels", "is_apart"), [(4, False), (8, True), (16, False)])
def test_pooling_of_few_channels_is_not_joined_with_what_is_pooled(pool, channels, is_apart):
    images = jnp.array(RNG.normal(size=(2, 6, 6, channels)), "float32")

    def function(_, x):
        return pool(nn.silu(x), (2, 2), (2, 2))

    compiled = cpu.Compiled(function)
    assert (" call(" in traced(compiled, images).lower().compile().as_text()) == is_apart
    np.testing.assert_allclose(compiled(None, images), function(None, images), atol=1e-6)


def test_gradient_of_large_windows_is_left_to_xla():
    def gradient(_, x):
        return jax.grad(lambda y: nn.max_pool(y, (6, 6)).sum())(x)

    images = jnp.array(RNG.normal(size=(2, 6, 6, 1)), "float32")
    compiled = cpu.Compiled(gradient)
    assert is_left_to_xla("select_and_scatter_add", compiled, images)
    np.testing.assert_array_equal(compiled(None, images), gradient(None, images))


@pytest.fixture
def no_onednn(monkeypatch):
    monkeypatch.setattr(onednn, "is_usable", lambda: False)


DEPTHWISE = {
    "plain": {},
    "strided": {"strides": (2, 3)},
    "even": {"kernel_size": (4, 2), "strides": (2, 2)},
    "gaps": {"kernel_size": (2, 2), "strides": (3, 3)},
    "dilated": {"kernel_dilation": (2, 3)},
    "dilated and strided": {"kernel_dilation": (2, 1), "strides": (2, 1)},
    "padded": {"padding": ((0, 3), (1, 0))},
    "valid": {"padding": "VALID"},
    "cropped": {"padding": ((-1, 1), (2, -2)), "strides": (2, 1)},
    "large": {"kernel_size": (7, 9)},
    "series": {"kernel_size": (5,), "strides": 2},
    "volume": {"kernel_size": (3, 2, 3), "strides": (1, 2, 1)},
}


def depthwise(**kwargs):
    kwargs = {"features": 4, "kernel_size": (3, 3), "feature_group_count": 4} | kwargs
    module = nn.Conv(**kwargs)
    sizes = {1: (20,), 2: (12, 13), 3: (7, 8, 6)}[len(module.kernel_size)]
    images = jnp.array(RNG.normal(size=(2, *sizes, 4)), "float32")
    return module, module.init(jax.random.key(0), images), images


@pytest.mark.usefixtures("no_onednn")
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_convolution_and_its_gradient_are_the_same(name):
    module, parameters, images = depthwise(**DEPTHWISE[name])

    def gradient(parameters, x):
        return jax.grad(lambda y: (module.apply(parameters, y) ** 2).sum())(x)

    for function in (module.apply, gradient):
        compiled = cpu.Compiled(function)
        assert not is_left_to_xla("conv_general_dilated", compiled, images, parameters=parameters)
        expected = jax.jit(function)(parameters, images)
        given = compiled(parameters, images)
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())


@pytest.mark.usefixtures("no_onednn")
@pytest.mark.parametrize(
    "changed",
    [
        {"feature_group_count": 2},
        {"features": 8},
        {"dtype": "bfloat16"},
        {"kernel_size": (5, 13)},
        {"kernel_size": (13, 3), "padding": "VALID"},
    ],
    ids=["groups", "multiplied", "half", "too large", "no results"],
)
def test_other_convolutions_with_groups_are_left_to_xla(changed):
    module, parameters, images = depthwise(**changed)
    compiled = cpu.Compiled(module.apply)
    assert is_left_to_xla("conv_general_dilated", compiled, images, parameters=parameters)
    expected = jax.jit(module.apply)(parameters, images)
    np.testing.assert_allclose(compiled(parameters, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("no_onednn")
@pytest.mark.parametrize(
    "numbers", [("NCHW", "HWIO", "NCHW"), ("NHWC", "HWIO", "NCHW"), ("NCHW", "HWIO", "NHWC")]
)
def test_depthwise_convolution_in_other_layouts_is_left_to_xla(numbers):
    images, kernel = np.ones((9, 9, 9, 9), "float32"), np.ones((3, 3, 1, 9), "float32")

    def convolve(_, x):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=9
        )

    assert is_left_to_xla("conv_general_dilated", cpu.Compiled(convolve), images)


@pytest.mark.usefixtures("no_onednn")
def test_kernel_of_a_depthwise_convolution_may_be_stored_in_another_order():
    images = jnp.array(RNG.normal(size=(2, 9, 10, 4)), "float32")
    kernel = jnp.array(RNG.normal(size=(4, 3, 1, 2)), "float32")

    def convolve(_, x):
        numbers = ("NHWC", "OHIW", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4
        )

    compiled = cpu.Compiled(convolve)
    assert not is_left_to_xla("conv_general_dilated", compiled, images)
    expected = jax.jit(convolve)(None, images)
    np.testing.assert_allclose(compiled(None, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("no_onednn")
def test_depthwise_convolution_where_jax_promotes_no_ranks():
    module, params, images = depthwise()

    def apply(params, x):
        return module.apply(params, x)

    with jax.numpy_rank_promotion("raise"):
        given = cpu.Compiled(apply)(params, images)
    np.testing.assert_allclose(given, module.apply(params, images), atol=1e-5)
