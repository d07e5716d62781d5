"""Reading jaxprs: tags, ReLUs, and what is inside of what.

All that depends on how JAX writes down a traced function is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

_TAG = "xplique_flax"
CALLS = ("jit", "closed_call", "checkpoint", "remat2")
# Each number of their result comes from the numbers at the same place of their operands.
ELEMENTWISE = {
    *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh"),
    *("bessel_i0e", "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz"),
    *("complex", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma"),
    *("div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt"),
    *("igamma", "igammac", "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p"),
    *("logistic", "lt", "max", "min", "mul", "name", "ne", "neg", "nextafter", "not", "or"),
    *("population_count", "pow", "real", "reduce_precision", "rem", "round", "rsqrt", "select_n"),
    *("sharding_constraint", "shift_left", "shift_right_arithmetic", "shift_right_logical"),
    *("sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"),
    "zeta",
}
_TRANSCENDENTAL = {
    *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e", "bessel_i1e"),
    *("cbrt", "cos", "cosh", "cumlogsumexp", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2"),
    *("expm1", "igamma", "igammac", "lgamma", "log", "log1p", "logistic", "pow", "sin", "sinh"),
    *("tan", "tanh", "zeta"),
}
LONGEST_UNROLLED = 128
_CUSTOM_CALLS = {"custom_jvp_call": "custom_jvp", "custom_vjp_call": "custom_vjp"}
_PRODUCTS = ("conv_general_dilated", "dot_general")

# What a value depends on, each including those before it.
_NOTHING, _PARAMETERS, _INPUTS = range(3)

# Activations that JAX makes of ReLUs, which are none themselves: Keras has them as one function.
_ACTIVATIONS = ("hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh")
_AVERAGES = {"reduce_window_sum": "avg_pool", "reduce_sum": "mean"}
_OPERATIONS = {
    "reduce_window_max": "max_pool",
    "reduce_max": "max",
    "reduce_sum": "sum",
    "dot_general": "dot",
    "logistic": "sigmoid",
}


def tag(tree: Any, kind: str, path: str) -> Any:
    """Mark the arrays of a module's inputs or outputs, so that they are found in the jaxpr.

    Parameters
    ----------
    tree
        The pytree of arguments or results; leaves that are no numeric arrays stay as they are.
    kind
        ``"in"`` or ``"out"``.
    path
        The module's path.
    """
    leaves, structure = jax.tree.flatten(tree)
    # An array that is given twice stays one object: modules ask whether query *is* key.
    arrays = {
        id(leaf): leaf
        for leaf in leaves
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.number)
    }
    tagged = {
        key: checkpoint_name(array, f"{_TAG}:{kind}:{index}:{path}")
        for index, (key, array) in enumerate(arrays.items())
    }
    return jax.tree.unflatten(structure, [tagged.get(id(leaf), leaf) for leaf in leaves])


def inline(closed: core.ClosedJaxpr, parameters: Sequence[Any], inputs: Any) -> list[Any]:
    """Evaluate a jaxpr of parameters and inputs so that no tag or ReLU is inside of a call.

    Calls are inlined. Loops over a stack of parameters, or with ReLUs in them, are unrolled; the
    steps of a stack are numbered in the paths of their modules: ``steps.0.Conv_0``.
    """
    arguments = [(value, _PARAMETERS) for value in parameters]
    results = _inline(closed, [*arguments, (inputs, _INPUTS)], lambda path: path)
    return [value for value, _ in results]


_Known = tuple[Any, int]  # a value, and what it depends on


def _inline(
    closed: core.ClosedJaxpr, arguments: Sequence[_Known], rename: Callable[[str], str]
) -> list[_Known]:
    jaxpr = closed.jaxpr
    constants = [(value, _NOTHING) for value in closed.consts]
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(atom: Any) -> _Known:
        return (atom.val, _NOTHING) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        known = [read(atom) for atom in eqn.invars]
        mark = parse_tag(eqn)
        if eqn.primitive.name in CALLS and any(map(_is_mark, equations_within(eqn))):
            results = _inline(called(eqn), known, rename)
        elif eqn.primitive.name == "scan" and _is_unrolled(eqn, known):
            results = _unroll(eqn, known, rename)
        elif mark and mark[0] != "name":
            kind, position, path = mark
            ((value, source),) = known
            renamed = checkpoint_name(value, f"{_TAG}:{kind}:{position}:{rename(path)}")
            results = [(renamed, source)]
        else:
            source = max((source for _, source in known), default=_NOTHING)
            results = [(value, source) for value in _bind(jaxpr, eqn, [v for v, _ in known])]
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    bound = {atom: v for atom, v in zip(eqn.invars, values, strict=True) if is_variable(atom)}
    single = jaxpr.replace(constvars=[], invars=list(bound), outvars=eqn.outvars, eqns=[eqn])
    return jax.core.eval_jaxpr(single, (), *bound.values())


def flipped_kernels(
    jaxpr: core.Jaxpr, count: int, is_exempt: Callable[..., bool]
) -> dict[Any, tuple[int, tuple[int, ...]]]:
    """Return the kernels that convolutions read backwards, as their gradients do.

    They are variables that are nothing but one of the first arguments with all axes but two
    reversed, those of the channels.

    Parameters
    ----------
    jaxpr
        The jaxpr; what is inside of its calls is left out.
    count
        How many arguments to look for.
    is_exempt
        A function of the operands' shapes and of the parameters of a convolution, which returns
        whether to leave its kernel out.

    Returns
    -------
    found
        For each variable the argument's number, and the axes.
    """
    numbers = {variable: i for i, variable in enumerate(jaxpr.invars[:count])}
    kernels = {
        eqn.invars[1]
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "conv_general_dilated"
        and not is_exempt(*(atom.aval for atom in eqn.invars), **eqn.params)
    }
    return {
        eqn.outvars[0]: (numbers[eqn.invars[0]], eqn.params["dimensions"])
        for eqn in jaxpr.eqns
        if _is_window_reversed(eqn) and eqn.outvars[0] in kernels and eqn.invars[0] in numbers
    }


def _is_window_reversed(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name != "rev":
        return False
    kernel: Any = eqn.outvars[0].aval
    return len(eqn.params["dimensions"]) == len(kernel.shape) - 2


def has_products_in_loops(jaxpr: core.Jaxpr) -> bool:
    """Return whether a loop multiplies matrices, as those of recurrent layers do."""
    return any(
        inner.primitive.name == "dot_general"
        for eqn in all_equations(jaxpr)
        if eqn.primitive.name in ("scan", "while")
        for inner in equations_within(eqn)
    )


def most_rows_multiplied(jaxpr: core.Jaxpr) -> int:
    """Return the most rows of a product, if all are those of rows with a matrix, as in perceptrons.

    Otherwise it is zero.
    """
    pairs: list[Any] = [
        [atom.aval for atom in eqn.invars]
        for eqn in all_equations(jaxpr)
        if eqn.primitive.name in _PRODUCTS
    ]
    if any(operand.ndim != 2 for pair in pairs for operand in pair):
        return 0
    return max((rows.shape[0] for rows, _ in pairs), default=0)


def has_groups_of_channels(jaxpr: core.Jaxpr) -> bool:
    """Return whether a convolution has groups of channels, as depthwise ones do."""
    return any(eqn.params.get("feature_group_count", 1) > 1 for eqn in all_equations(jaxpr))


def share_of_transcendentals(jaxpr: core.Jaxpr) -> float:
    """Return which share of all numbers that are computed are exponentials, logarithms or alike."""
    all_numbers = transcendentals = 0
    for eqn in all_equations(jaxpr):
        numbers = sum(getattr(variable.aval, "size", 0) for variable in eqn.outvars)
        all_numbers += numbers
        if eqn.primitive.name in _TRANSCENDENTAL:
            transcendentals += numbers
    return transcendentals / max(1, all_numbers)


def largest_array(jaxpr: core.Jaxpr) -> int:
    """Return how many bytes the largest array has that is computed."""
    variables = (variable for eqn in all_equations(jaxpr) for variable in eqn.outvars)
    avals: Any = (variable.aval for variable in variables if hasattr(variable.aval, "dtype"))
    return max((aval.size * aval.dtype.itemsize for aval in avals), default=0)


def read_arguments(jaxpr: core.Jaxpr) -> list[bool]:
    """Return for each argument whether the results depend on its values."""
    needed = set(only_variables(jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed.update(only_variables(eqn.invars))
    return [variable in needed for variable in jaxpr.invars]


class Recomputed(NamedTuple):
    """What the equations of a gradient compute again, and do not read as it was computed before."""

    readers: Set[int]
    """The numbers of those equations."""
    makers: Mapping[Any, core.JaxprEqn | None]
    """The equations that compute each variable again, and none for what is kept instead."""


NOTHING = Recomputed(frozenset(), {})


def substitute(
    closed: core.ClosedJaxpr,
    substitutes: Mapping[str, Callable],
    arguments: Sequence[Any],
    known: Mapping[Any, Any],
    keep: Callable,
    recomputed: Recomputed = NOTHING,
) -> list[Any]:
    """Evaluate a jaxpr with other functions in the place of some primitives.

    Parameters
    ----------
    closed
        The jaxpr.
    substitutes
        Functions of a primitive's operands and parameters, by the primitive's name, which return
        ``NotImplemented`` for what stays as it is. They are used outside of loops and branches.
    arguments
        The arguments of the jaxpr.
    known
        Variables whose values are known already.
    keep
        A function of each mask that is needed again after a product of matrices or a convolution,
        which returns the same mask.
    recomputed
        What to compute again where the gradient reads it.
    """
    jaxpr = _with_dilated_sums(_comparing_outputs(closed.jaxpr))
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *arguments], strict=True))
    env |= known
    kept = _kept_masks(jaxpr)
    again: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    def read_again(atom: Any) -> Any:
        if not is_variable(atom) or atom not in recomputed.makers:
            return read(atom)
        if atom not in again:
            maker = recomputed.makers[atom]
            if maker is None:
                # Else XLA would see that the same was computed before.
                again[atom] = lax.optimization_barrier(env[atom])
            else:
                made = _bind(jaxpr, maker, [read_again(operand) for operand in maker.invars])
                again.update(
                    (variable, value)
                    for variable, value in zip(maker.outvars, made, strict=True)
                    if recomputed.makers.get(variable) is maker
                )
        return again[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        if not known.keys().isdisjoint(eqn.outvars):
            continue
        reader = read_again if number in recomputed.readers else read
        values = [reader(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        result = NotImplemented
        if name in substitutes:
            result = substitutes[name](*values, **eqn.params)
        if result is not NotImplemented:
            results = [result]
        elif name in (*CALLS, "custom_jvp_call") and any(
            e.primitive.name in substitutes for e in equations_within(eqn)
        ):
            results = substitute(called(eqn), substitutes, values, {}, keep)
        else:
            results = _bind(jaxpr, eqn, values)
        for variable, result in zip(eqn.outvars, results, strict=True):
            env[variable] = keep(result) if variable in kept else result
    return [read(atom) for atom in jaxpr.outvars]


def called(call: core.JaxprEqn) -> core.ClosedJaxpr:
    """Return what an equation calls."""
    inner = call.params["call_jaxpr" if "call_jaxpr" in call.params else "jaxpr"]
    return inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())


def _comparing_outputs(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """Compare what ReLUs return with their bounds, and not what they are given.

    It is the same, and what they are given is not needed any longer.
    """
    relus = {}
    equations = []
    for eqn in jaxpr.eqns:
        ceiling, name = relu_ceiling(eqn), eqn.primitive.name
        if ceiling is not None and is_variable(eqn.invars[0]):
            relus[eqn.invars[0]] = eqn.outvars[0], {"gt": 0.0, "lt": ceiling}
        elif name in ("gt", "lt") and is_variable(eqn.invars[0]):
            compared, bound = eqn.invars
            output, bounds = relus.get(compared, (compared, {}))
            if isinstance(bound, core.Literal) and bound.val == bounds.get(name):
                eqn = eqn.replace(invars=[output, bound])
        equations.append(eqn)
    return jaxpr.replace(eqns=equations)


def _with_dilated_sums(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """Join zeros that are put around and between numbers with the sum over windows of the result.

    The gradient of average pooling is such a sum.
    """
    pads = {}
    equations = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "pad" and getattr(eqn.invars[1], "val", None) == 0:
            *padding, between = zip(*eqn.params["padding_config"], strict=True)
            pads[eqn.outvars[0]] = (
                eqn.invars[0],
                {
                    "padding": tuple(zip(*padding, strict=True)),
                    "base_dilation": tuple(1 + zeros for zeros in between),
                },
            )
        elif name == "reduce_window_sum" and eqn.invars[0] in pads:
            array, around = pads[eqn.invars[0]]
            if not any(map(any, eqn.params["padding"])) and max(eqn.params["base_dilation"]) == 1:
                eqn = eqn.replace(invars=[array], params=eqn.params | around)
        equations.append(eqn)
    return jaxpr.replace(eqns=equations)


def _kept_masks(jaxpr: core.Jaxpr) -> set[Any]:
    """Return the masks that are needed again after a product of matrices or a convolution."""
    last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in only_variables(eqn.invars)}
    products = [
        i
        for i, eqn in enumerate(jaxpr.eqns)
        if any(e.primitive.name in _PRODUCTS for e in (eqn, *equations_within(eqn)))
    ]
    return {
        variable
        for i, eqn in enumerate(jaxpr.eqns)
        for variable in eqn.outvars
        if getattr(variable.aval, "dtype", "") == "bool"
        if any(i <= product < last_use.get(variable, -1) for product in products)
    }


def _is_unrolled(scan: core.JaxprEqn, known: Sequence[_Known]) -> bool:
    inner = list(equations_within(scan))
    if any(relu_ceiling(eqn) is not None for eqn in inner):
        wanted = True
    else:
        wanted = _is_over_parameters(scan, known) and any(map(parse_tag, inner))
    return wanted and 0 < scan.params["length"] <= LONGEST_UNROLLED


def _is_over_parameters(scan: core.JaxprEqn, known: Sequence[_Known]) -> bool:
    stacked = known[sum(constant_and_carried(scan)) :]
    return any(source == _PARAMETERS for _, source in stacked)


def constant_and_carried(scan: core.JaxprEqn) -> tuple[int, int]:
    """Return how many inputs of a loop are constant, and how many are carried after these."""
    if "num_consts" in scan.params:  # before JAX 0.12
        return scan.params["num_consts"], scan.params["num_carry"]
    constant, carried, _ = scan.params["ft_in"].unpack()
    return len(constant), len(carried)


def _unroll(
    scan: core.JaxprEqn, known: Sequence[_Known], rename: Callable[[str], str]
) -> list[_Known]:
    length = scan.params["length"]
    n_consts, n_carry = constant_and_carried(scan)
    consts, carry = known[:n_consts], known[n_consts : n_consts + n_carry]
    stacked = known[n_consts + n_carry :]
    body = scan.params["jaxpr"]
    roots = _roots(body.jaxpr) if _is_over_parameters(scan, known) else []
    collected: list[list[_Known]] = [[]] * length
    for step in reversed(range(length)) if scan.params["reverse"] else range(length):

        def numbered(path: str, step: int = step) -> str:
            for root in roots:
                if f"{path}.".startswith(f"{root}."):
                    path = f"{root}.{step}{path.removeprefix(root)}"
            return rename(path)

        slices = [(value[step], source) for value, source in stacked]
        results = _inline(body, [*consts, *carry, *slices], numbered)
        carry, collected[step] = results[:n_carry], results[n_carry:]
    stacks = [
        (jnp.stack([value for value, _ in steps]), max(source for _, source in steps))
        for steps in zip(*collected, strict=True)
    ]
    return [*carry, *stacks]


def _roots(jaxpr: core.Jaxpr) -> list[str]:
    """Return the paths of the modules that are in no other module of the jaxpr."""
    marks = [mark for eqn in all_equations(jaxpr) if (mark := parse_tag(eqn))]
    paths = {path for kind, _, path in marks if kind != "name"}
    return [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]


def is_variable(atom: Any) -> bool:
    """Tell a variable from a literal."""
    return not isinstance(atom, core.Literal)


def only_variables(atoms: Iterable[Any]) -> list[Any]:
    """Leave the literals out."""
    return [atom for atom in atoms if is_variable(atom)]


def equations_within(eqn: core.JaxprEqn) -> Iterator[core.JaxprEqn]:
    """Yield the equations inside of an equation, at any depth."""
    if eqn.params.get("name") in _ACTIVATIONS:
        return
    for jaxpr in core.jaxprs_in_params(eqn.params):
        yield from all_equations(jaxpr)


def all_equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Yield the equations of a jaxpr, and those inside of them."""
    for eqn in jaxpr.eqns:
        yield eqn
        yield from equations_within(eqn)


def _is_mark(eqn: core.JaxprEqn) -> bool:
    return parse_tag(eqn) is not None or relu_ceiling(eqn) is not None


def parse_tag(eqn: core.JaxprEqn) -> tuple[str, int, str] | None:
    """Return a tag's kind, its position among those of one call, and the module's path.

    What the user named with ``checkpoint_name`` is of the kind ``"name"``.
    """
    if eqn.primitive.name != "name":
        return None
    name = eqn.params["name"]
    if not name.startswith(f"{_TAG}:"):
        return "name", 0, name
    _, kind, position, path = name.split(":", 3)
    return kind, int(position), path


def relu_ceiling(eqn: core.JaxprEqn) -> float | None:
    """Return where a ReLU saturates, infinity for a plain one; ``None`` if it is no ReLU.

    A function is a ReLU by its name and by what it computes: a user's own ``relu`` may be another.
    """
    if eqn.primitive.name != "custom_jvp_call":
        return None
    inner = list(equations_within(eqn))
    if eqn.params["call_jaxpr"].jaxpr.debug_info.func_name not in ("relu", "relu6"):
        return None
    steps = [e for e in inner if not list(core.jaxprs_in_params(e.params))]
    bounds = [
        (e.primitive.name, [float(a.val) for a in e.invars if isinstance(a, core.Literal)])
        for e in steps
    ]
    if bounds == [("max", [0.0])]:
        return float("inf")
    if len(bounds) == 2 and bounds[0] == ("max", [0.0]) and bounds[1][0] == "min":
        return bounds[1][1][0] if bounds[1][1] else None
    return None


def operation_name(equations: Sequence[core.JaxprEqn]) -> str:
    """Return what some equations do, as far as the last of them tells, as a name for them all."""
    if not equations:
        return "identity"
    last = equations[-1].primitive.name
    sums = [eqn for eqn in equations if eqn.primitive.name in _AVERAGES]
    if last == "div" and sums:
        summed = {str(eqn.primitive.name) for eqn in equations if eqn.outvars[0] in sums[-1].invars}
        return "softmax" if "exp" in summed else _AVERAGES[sums[-1].primitive.name]
    called = str(equations[-1].params.get("name", last)).strip("_")
    return _OPERATIONS.get(called, called)


def enclosing_operation(eqn: core.JaxprEqn) -> str:
    """Return what users call the operation that has other equations inside."""
    return _CUSTOM_CALLS.get(eqn.primitive.name, eqn.primitive.name)


def is_convolution(eqn: core.JaxprEqn) -> bool:
    """Return whether an equation convolves over all channels, itself or inside of a call.

    The channels have to come last: who looks for a convolution reads its output as (N, H, W, C).
    """
    inner = equations_within(eqn) if eqn.primitive.name in CALLS else ()
    return any(
        each.primitive.name == "conv_general_dilated"
        and _has_channels_last(each)
        and not _is_depthwise(each)
        for each in (eqn, *inner)
    )


def _has_channels_last(convolution: core.JaxprEqn) -> bool:
    channels = convolution.params["dimension_numbers"].out_spec[1]
    return channels == len(convolution.params["dimension_numbers"].out_spec) - 1


def _is_depthwise(convolution: core.JaxprEqn) -> bool:
    # Keras's DepthwiseConv2D has no `filters`, and so is no layer that Grad-CAM takes by default.
    groups = convolution.params["feature_group_count"]
    channels = convolution.params["dimension_numbers"].lhs_spec[1]
    inputs: Any = convolution.invars[0].aval
    return groups > 1 and groups == inputs.shape[channels]


def convolution_ranks(jaxpr: core.Jaxpr) -> set[int]:
    """Return how many dimensions the inputs of the convolutions have, batch and channels too."""
    return {
        len(eqn.params["dimension_numbers"].out_spec)
        for eqn in all_equations(jaxpr)
        if eqn.primitive.name == "conv_general_dilated"
    }
