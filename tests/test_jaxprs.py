"""How JAX writes down what `xplique_flax.jaxprs` reads: what fails here is what JAX has changed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from xplique_flax import jaxprs

X = jnp.arange(-2.0, 4).reshape(2, 3)


def equations(function, *arguments):
    return jax.make_jaxpr(function)(*arguments).eqns


def only(function, *arguments):
    (eqn,) = equations(function, *arguments)
    return eqn


def test_name_is_kept_in_the_parameter_called_name():
    eqn = only(lambda x: checkpoint_name(x, "here"), X)
    assert (eqn.primitive.name, eqn.params["name"]) == ("name", "here")
    assert jaxprs.parse_tag(eqn) == ("name", 0, "here")


def test_tag_is_read_as_it_was_written():
    first, second = equations(lambda a, b: jaxprs.tag((a, b), "in", "block.conv"), X, X + 1)
    assert jaxprs.parse_tag(first) == ("in", 0, "block.conv")
    assert jaxprs.parse_tag(second) == ("in", 1, "block.conv")


@pytest.mark.parametrize(
    ("function", "ceiling"),
    [
        (nn.relu, np.inf),
        (jax.nn.relu, np.inf),
        (jax.nn.relu6, 6.0),
        (nn.gelu, None),
        (jax.nn.silu, None),
        (lambda x: jnp.maximum(x, 0), None),
    ],
    ids=["relu", "jax.nn.relu", "relu6", "gelu", "silu", "maximum"],
)
def test_relu_is_a_custom_derivative_of_that_name(function, ceiling):
    closed = jax.make_jaxpr(function)(X)
    found = [jaxprs.relu_ceiling(eqn) for eqn in jaxprs.all_equations(closed.jaxpr)]
    assert [value for value in found if value is not None] == [ceiling] * (ceiling is not None)


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_call_has_its_body_in_the_parameter_called_jaxpr(transform):
    (eqn,) = equations(transform(lambda x: jax.nn.relu(x) + 1), X)
    assert eqn.primitive.name in jaxprs.CALLS
    assert isinstance(eqn.params["jaxpr"], core.ClosedJaxpr | core.Jaxpr)
    assert any(jaxprs.relu_ceiling(inner) for inner in jaxprs.equations_within(eqn))


def test_loop_says_what_is_constant_carried_and_scanned():
    def body(carry, x):
        return carry + x * X[0], carry

    eqn = equations(lambda xs: jax.lax.scan(body, X[0], xs, reverse=True), X)[-1]
    assert eqn.primitive.name == "scan"
    assert (eqn.params["length"], eqn.params["reverse"]) == (2, True)
    assert jaxprs.constant_and_carried(eqn) == (1, 1)
    assert isinstance(eqn.params["jaxpr"], core.ClosedJaxpr)
    assert len(eqn.invars) == 3


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_unrolled_loop_computes_the_same(reverse, stacked):
    """Over parameters, where each step has a path of its own, or over what is computed."""
    kernels = jnp.linspace(-1, 1, 36).reshape(4, 3, 3)

    def function(parameters, x):
        def body(carry, kernel):
            (tagged,) = jaxprs.tag([jax.nn.relu(carry @ kernel) - 0.1], "out", "step")
            return tagged, tagged.sum()

        scanned = parameters if stacked else parameters * (1 + 0 * x.sum())
        return jax.lax.scan(body, x, scanned, reverse=reverse)

    closed = jax.make_jaxpr(function)(kernels, X)
    flat = jax.make_jaxpr(lambda p, x: jaxprs.inline(closed, [p], x))(kernels, X)
    assert not [eqn for eqn in flat.jaxpr.eqns if eqn.primitive.name == "scan"]
    order = reversed(range(4)) if reverse else range(4)
    expected = [f"step.{i}" for i in order] if stacked else ["step"] * 4
    marks = [jaxprs.parse_tag(eqn) for eqn in flat.jaxpr.eqns]
    assert [mark[2] for mark in marks if mark] == expected
    results = jax.core.eval_jaxpr(flat.jaxpr, flat.consts, kernels, X)
    for own, reference in zip(results, function(kernels, X), strict=True):
        np.testing.assert_allclose(own, reference, rtol=1e-6)


def test_convolution_says_where_its_channels_are():
    x = jnp.zeros((1, 5, 5, 4))
    parameters = nn.Conv(6, (3, 3)).init(jax.random.key(0), x)
    closed = jax.make_jaxpr(nn.Conv(6, (3, 3)).apply)(parameters, x)
    found = list(filter(jaxprs.is_convolution, jaxprs.all_equations(closed.jaxpr)))
    assert [eqn.primitive.name for eqn in found] == ["conv_general_dilated"]
    assert jaxprs.convolution_ranks(closed.jaxpr) == {4}

    depthwise = nn.Conv(4, (3, 3), feature_group_count=4)
    parameters = depthwise.init(jax.random.key(0), x)
    closed = jax.make_jaxpr(depthwise.apply)(parameters, x)
    assert not list(filter(jaxprs.is_convolution, jaxprs.all_equations(closed.jaxpr)))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: nn.max_pool(x, (2, 2)), "max_pool"),
        (lambda x: nn.avg_pool(x, (2, 2)), "avg_pool"),
        (lambda x: x.mean((1, 2)), "mean"),
        (lambda x: x.reshape(1, -1), "reshape"),
        (nn.softmax, "softmax"),
        (nn.sigmoid, "sigmoid"),
    ],
)
def test_operations_have_the_names_that_users_know(function, name):
    assert jaxprs.operation_name(equations(function, jnp.ones((1, 4, 4, 2)))) == name


def test_arguments_that_results_depend_on():
    def function(a, b, c, d):
        return a * jnp.sin(b), jnp.zeros(c.shape), jax.jit(jnp.exp)(d)

    closed = jax.make_jaxpr(lambda *arguments: function(*arguments)[:2])(X, X, X, X)
    assert jaxprs.read_arguments(closed.jaxpr) == [True, True, False, False]
    closed = jax.make_jaxpr(function)(X, X, X, X)
    assert jaxprs.read_arguments(closed.jaxpr) == [True, True, False, True]
