"""Whether the samples of a batch are computed independently of each other.

A batch of independent samples may be padded, split, and spread over devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from .jaxprs import CALLS, ELEMENTWISE, constant_and_carried, is_variable, only_variables

PROBE = 1009  # a prime: the sizes that it divides are those of the batch
_CALLS = (*CALLS, "custom_jvp_call", "custom_vjp_call")
_OPAQUE = (
    *("ffi_call", "io_callback", "pallas", "philox", "pure_callback", "rng_", "shard_map"),
    "threefry",
)
_EACH_ITS_OWN = ("optimization_barrier", "device_put")  # results, of as many operands
_MOVED = ("broadcast_in_dim", "squeeze", "stack", "transpose")
_ALONG = ("axis", "axes", "dimension", "dimensions")
_OF_AXES = (
    *("argmax", "argmin", "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "iota"),
    *("reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum"),
    *("reduce_xor", "rev", "sort", "split", "top_k", "unstack"),
)
_OF_MATRICES = (
    *("cholesky", "eigh", "geqrf", "householder_product", "lu", "lu_pivots_to_permutation", "qr"),
    *("svd", "triangular_solve"),
)
_WINDOW = ("window_dimensions", "window_strides", "padding")
_OF_WINDOWS = (
    *("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum"),
    *("select_and_gather_add", "select_and_scatter_add"),
)
# Numbers of samples times what a sample has are looked for up to here.
_MOST_COUNTED = 1000


class _Mixed(Exception):
    """Something depends on more than one sample, or on the place of a sample in the batch."""


class Cost(NamedTuple):
    """What a function costs."""

    written: float
    """Bytes that its operations write for each sample."""
    alive: float
    """Bytes that are needed at the same time, at most."""
    operations: int


def traced_batch(
    function: Callable[..., Any], parameters: Any, sample: tuple[int, ...], size: int = PROBE
) -> core.ClosedJaxpr | None:
    """Trace a function for a batch of so many samples; ``None`` if it takes no such batch."""
    batch = jax.ShapeDtypeStruct((size, *sample), jnp.float32)
    try:
        with jax.disable_jit(False):  # the user's setting would unroll the loops
            return jax.make_jaxpr(function)(parameters, batch)
    except Exception:  # of whatever kind the model raises
        return None


def cost_per_sample(traced: core.ClosedJaxpr | None, of_pullback: bool = False) -> Cost | None:
    """Return what a traced batch costs for each sample; `alive` with `of_pullback` in its gradient.

    It is ``None`` unless each sample's output is the same in whatever batch the sample is. The
    operations tell: whatever depends on the inputs must have the batch as one of its axes, along
    which nothing is mixed, ordered, counted or drawn. What is not known here counts as mixing.
    """
    if traced is None:
        return None
    jaxpr = traced.jaxpr
    try:
        _follow(jaxpr, [0] * (len(jaxpr.invars) - 1) + [1])
        alive = _bytes_alive(_pullback(traced) if of_pullback else jaxpr)
    except Exception:  # whatever an operation has that is not understood
        return None
    return Cost(_bytes_written(jaxpr) / PROBE, alive / PROBE, _operations(jaxpr))


def _pullback(closed: core.ClosedJaxpr) -> core.Jaxpr:
    """Return the pullback by the last argument, for cotangents of all results."""

    def pull_back(arguments: list[Any], cotangents: list[Any]) -> Any:
        *others, inputs = arguments
        _, vjp = jax.vjp(lambda x: core.jaxpr_as_fun(closed)(*others, x), inputs)
        return vjp(cotangents)

    return jax.make_jaxpr(pull_back)(closed.in_avals, closed.out_avals).jaxpr


def _bytes_written(jaxpr: core.Jaxpr) -> int:
    total = 0
    for eqn in _live(jaxpr).eqns:
        inner = _inner(eqn)
        if inner:
            total += eqn.params.get("length", 1) * sum(map(_bytes_written, inner))
        else:
            total += sum(map(_bytes, eqn.outvars))
    return total


def _bytes_alive(jaxpr: core.Jaxpr) -> int:
    jaxpr = _live(jaxpr)
    eqns = jaxpr.eqns
    last_use = {v: i for i, eqn in enumerate(eqns) for v in only_variables(eqn.invars)}
    last_use |= dict.fromkeys(only_variables(jaxpr.outvars), len(eqns))
    dying: list[list[int]] = [[] for _ in range(len(eqns) + 1)]
    for i, eqn in enumerate(eqns):
        for variable in eqn.outvars:
            dying[last_use.get(variable, i)].append(_bytes(variable))
    now = most = 0
    for eqn, freed in zip(eqns, dying, strict=False):
        made = sum(map(_bytes, eqn.outvars))
        # A result may take the place of an operand of its size.
        added = 0 if made in freed else made
        within = [_bytes_alive(jaxpr) - sum(freed) for jaxpr in _inner(eqn)]
        most = max(most, now + max([added, *within]))
        now += made - sum(freed)
    return most


def _bytes(variable: Any) -> int:
    aval = variable.aval
    return aval.size * aval.dtype.itemsize if _batch_axes(aval) else 0


def _inner(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    return [getattr(jaxpr, "jaxpr", jaxpr) for jaxpr in core.jaxprs_in_params(eqn.params)]


def _operations(jaxpr: core.Jaxpr) -> int:
    return sum(1 + sum(map(_operations, _inner(eqn))) for eqn in _live(jaxpr).eqns)


def _follow(jaxpr: core.Jaxpr, arguments: Sequence[int]) -> list[int]:
    """Return the steps of the results, given those of the arguments.

    The step of an array is how many places apart two neighbours of the batch are on the axis that
    the batch is in. It is larger than one if other axes were folded into this one behind the batch,
    and zero for an array that is the same for all samples.
    """
    jaxpr = _live(jaxpr)
    if any(_batch_axes(variable.aval) for variable in jaxpr.constvars):
        raise _Mixed
    known = dict(zip(jaxpr.invars, arguments, strict=True))

    def step(atom: Any) -> int:
        return known.get(atom, 0) if is_variable(atom) else 0

    for eqn in jaxpr.eqns:
        results = _follow_equation(eqn, [step(atom) for atom in eqn.invars])
        for variable, result in zip(eqn.outvars, results, strict=True):
            if result and len(_batch_axes(variable.aval)) != 1:
                raise _Mixed
        known.update(zip(eqn.outvars, results, strict=True))
    return [step(atom) for atom in jaxpr.outvars]


def _live(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """Return what the results of a jaxpr need, without tags, which only name what is there."""
    named: dict[Any, Any] = {}

    def unnamed(atoms: Sequence[Any]) -> list[Any]:
        return [named.get(atom, atom) if is_variable(atom) else atom for atom in atoms]

    equations = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            (named[eqn.outvars[0]],) = unnamed(eqn.invars)
        elif named.keys().isdisjoint(only_variables(eqn.invars)):
            equations.append(eqn)
        else:
            equations.append(eqn.replace(invars=unnamed(eqn.invars)))
    results = unnamed(jaxpr.outvars)
    needed = set(only_variables(results))
    live = []
    for eqn in reversed(equations):
        if not needed.isdisjoint(eqn.outvars):
            needed.update(only_variables(eqn.invars))
            live.append(eqn)
    return jaxpr.replace(eqns=live[::-1], outvars=results)


def _follow_equation(eqn: core.JaxprEqn, steps: list[int]) -> list[int]:
    name = eqn.primitive.name
    if name.startswith(_OPAQUE) or any(map(_is_counted, eqn.invars)):
        raise _Mixed
    inner = _inner(eqn)
    if name in _CALLS:
        return _follow(inner[0], steps)
    if name == "scan":
        return _follow_scan(eqn, inner[0], steps)
    if name == "cond":
        branches = [_follow(branch, steps[1:]) for branch in inner]
        return [_common(results) for results in zip(*branches, strict=True)]
    if name == "while":
        return _follow_while(eqn, steps)
    if name in _EACH_ITS_OWN:
        return steps
    has_batch = any(_batch_axes(atom.aval) for atom in (*eqn.invars, *eqn.outvars))
    step = _step(eqn, _common(steps)) if has_batch else 0
    return [step] * len(eqn.outvars)


def _is_counted(atom: Any) -> bool:
    """Return whether a constant is there for each sample, or is their number or its inverse."""
    if is_variable(atom):
        return False
    if np.ndim(atom.val):
        return bool(_batch_axes(atom.aval))
    value = abs(complex(atom.val))
    ratios = [each / PROBE for each in (value, 1 / value)] if value else []
    return any(0.5 < r < _MOST_COUNTED and abs(r - round(r)) < 1e-4 for r in ratios)


def _common(steps: Sequence[int]) -> int:
    """Return the step of what is computed from arrays with some steps."""
    if len({*steps} - {0}) > 1:
        raise _Mixed
    return max(steps, default=0)


def _batch_axes(aval: Any) -> list[int]:
    """Return the axes that the batch is in, alone or folded with others; twice if squared."""
    axes = [axis for axis, size in enumerate(aval.shape) if size and size % PROBE == 0]
    return axes + [axis for axis in axes if aval.shape[axis] % PROBE**2 == 0]


# The axes along which arrays are put one after the other.
_JOINED: dict[str, Callable[[Any], list[int]]] = {
    "concatenate": lambda params: [params["dimension"]],
    "tile": lambda params: [axis for axis, times in enumerate(params["reps"]) if times > 1],
}


def _anyhow(params: Any, *avals: Any) -> bool:
    return True


def _along_others(params: Any, first: Any, *_: Any) -> bool:
    along = [params[key] for key in _ALONG if key in params] or [-1]
    axes = {axis % len(first.shape) for axis in jax.tree.leaves(along)}
    return axes.isdisjoint(_batch_axes(first))


def _convolved(params: Any, inputs: Any, kernel: Any, _: Any) -> bool:
    has_batch_first = _batch_axes(inputs) == [params["dimension_numbers"].lhs_spec[0]]
    return has_batch_first and not _batch_axes(kernel) and params["batch_group_count"] == 1


def _multiplied(params: Any, first: Any, second: Any, _: Any) -> bool:
    contracted = zip((first, second), params["dimension_numbers"][0], strict=True)
    return all({*_batch_axes(aval)}.isdisjoint(axes) for aval, axes in contracted)


def _sliced(params: Any, first: Any, *others: Any) -> bool:
    return _is_as_long(first, others[-1])


def _updated(params: Any, first: Any, update: Any, *_: Any) -> bool:
    return _is_as_long(first, update)


def _is_as_long(first: Any, part: Any) -> bool:
    return all(first.shape[axis] == part.shape[axis] for axis in _batch_axes(first))


def _padded(params: Any, first: Any, *_: Any) -> bool:
    return all(params["padding_config"][axis] == (0, 0, 0) for axis in _batch_axes(first))


def _gathered(params: Any, first: Any, *_: Any) -> bool:
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    return all(
        axis in numbers.operand_batching_dims
        or (axis not in numbers.start_index_map and sizes[axis] == first.shape[axis])
        for axis in _batch_axes(first)
    )


def _transformed(params: Any, first: Any, _: Any) -> bool:
    axes = range(len(first.shape))[-len(params["fft_lengths"]) :]
    return {*_batch_axes(first)}.isdisjoint(axes)


def _taken_as_matrices(params: Any, *avals: Any) -> bool:
    return all(axis < len(aval.shape) - 2 for aval in avals[:-1] for axis in _batch_axes(aval))


def _windowed(params: Any, first: Any, *_: Any) -> bool:
    windows = [*zip(*(params[key] for key in _WINDOW), strict=True)]
    return all(windows[axis] == (1, 1, (0, 0)) for axis in _batch_axes(first))


# Whether an operation works on each sample by itself, given its parameters, and the shapes of what
# it reads and of its result. What is not here counts as mixing.
_IS_APART: dict[str, Callable[..., bool]] = {
    **dict.fromkeys((*ELEMENTWISE, *_MOVED), _anyhow),
    **dict.fromkeys(_OF_AXES, _along_others),
    **dict.fromkeys(_OF_MATRICES, _taken_as_matrices),
    **dict.fromkeys(_OF_WINDOWS, _windowed),
    "conv_general_dilated": _convolved,
    "dot_general": _multiplied,
    "dynamic_slice": _sliced,
    "dynamic_update_slice": _updated,
    "fft": _transformed,
    "gather": _gathered,
    "pad": _padded,
    "slice": _sliced,
}


def _step(eqn: core.JaxprEqn, step: int) -> int:
    """Return the step of the results of one operation, given that of what it reads."""
    name, params = eqn.primitive.name, eqn.params
    avals: list[Any] = [atom.aval for atom in (*eqn.invars, eqn.outvars[0])]
    if name == "reshape":
        return _reshaped(avals[0], avals[-1], step)
    if name in _JOINED:
        along = _JOINED[name](params)
        for axis in {*_batch_axes(avals[-1])}.intersection(along):
            step = _joined([aval.shape[axis] for aval in avals[:-1]], step)
        return step
    if name not in _IS_APART or not _IS_APART[name](params, *avals):
        raise _Mixed
    return step


def _reshaped(before: Any, after: Any, step: int) -> int:
    (axis,), (place,) = _batch_axes(before), _batch_axes(after)
    inside, inside_after = math.prod(before.shape[axis + 1 :]), math.prod(after.shape[place + 1 :])
    if not step and (before.shape[axis], inside) == (after.shape[place], inside_after):
        return 0
    new, rest = divmod(inside * max(1, step), inside_after)
    if rest or not new or after.shape[place] // PROBE % new:
        raise _Mixed
    return new


def _joined(sizes: Sequence[int], step: int) -> int:
    """Return the step where arrays are put one after the other along the axis of the batch."""
    step = max(1, step)
    if any(size % (PROBE * step) for size in sizes):
        raise _Mixed
    return step


def _follow_scan(eqn: core.JaxprEqn, body: core.Jaxpr, steps: list[int]) -> list[int]:
    constant, carried = constant_and_carried(eqn)
    if eqn.params["length"] % PROBE == 0:  # a loop over the samples
        if carried or any(steps[:constant]):
            raise _Mixed
        return [_common(steps)] * len(eqn.outvars)
    carry = steps[constant : constant + carried]
    while True:
        results = _follow(body, [*steps[:constant], *carry, *steps[constant + carried :]])
        merged = [_common(pair) for pair in zip(carry, results[:carried], strict=True)]
        if merged == carry:
            return [*carry, *results[carried:]]
        carry = merged


def _follow_while(eqn: core.JaxprEqn, steps: list[int]) -> list[int]:
    n_test, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, constants, carry = (
        steps[:n_test],
        steps[n_test : n_test + n_body],
        steps[n_test + n_body :],
    )
    while True:
        _follow(eqn.params["cond_jaxpr"].jaxpr, [*test, *carry])
        results = _follow(eqn.params["body_jaxpr"].jaxpr, [*constants, *carry])
        merged = [_common(pair) for pair in zip(carry, results, strict=True)]
        if merged == carry:
            return carry
        carry = merged
