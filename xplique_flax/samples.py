"""Whether the samples of a batch are computed independently of each other.

A batch of independent samples may be padded, split, and spread over devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from .jaxprs import constant_and_carried, is_variable, only_variables

PROBE = 1009  # a prime: the sizes that it divides are those of the batch
_CALLS = ("jit", "closed_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")
_ALONG = ("axis", "axes", "dimension", "dimensions")
_IN_ORDER = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "rev", "top_k")
_OPAQUE = ("threefry", "rng_", "pure_callback", "io_callback", "ffi_call", "shard_map", "pallas")


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
    function: Callable[..., Any], parameters: Any, sample: tuple[int, ...]
) -> core.ClosedJaxpr | None:
    """Trace a function for a batch of `PROBE` samples; ``None`` if it takes no such batch."""
    batch = jax.ShapeDtypeStruct((PROBE, *sample), jnp.float32)
    try:
        with jax.disable_jit(False):  # the user's setting would unroll the loops
            return jax.make_jaxpr(function)(parameters, batch)
    except Exception:  # of whatever kind the model raises
        return None


def cost_per_sample(traced: core.ClosedJaxpr | None, of_pullback: bool = False) -> Cost | None:
    """Return what a traced batch costs for each sample; `alive` with `of_pullback` in its gradient.

    It is ``None`` unless each sample's output is the same in whatever batch the sample is. The
    operations tell: whatever depends on the inputs must have the batch as one of its axes, along
    which nothing is mixed, ordered, counted or drawn. What is not understood counts as mixing.
    """
    if traced is None:
        return None
    jaxpr = traced.jaxpr
    try:
        _follow(jaxpr, [False] * (len(jaxpr.invars) - 1) + [True])
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


def _follow(jaxpr: core.Jaxpr, arguments: Sequence[bool]) -> list[bool]:
    """Return which results depend on the batch's values, given which arguments do."""
    jaxpr = _live(jaxpr)
    known = dict(zip(jaxpr.invars, arguments, strict=True))

    def depends(atom: Any) -> bool:
        return is_variable(atom) and known.get(atom, False)

    for eqn in jaxpr.eqns:
        marks = [depends(atom) for atom in eqn.invars]
        results = _follow_equation(eqn, marks)
        for variable, mark in zip(eqn.outvars, results, strict=True):
            aval: Any = variable.aval
            if mark and len(_batch_axes(aval)) != 1:
                raise _Mixed
        known.update(zip(eqn.outvars, results, strict=True))
    return [depends(atom) for atom in jaxpr.outvars]


def _live(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """Return what the results of a jaxpr need, without tags, which only name what is there."""
    named: dict[Any, Any] = {}

    def unnamed(atoms: Sequence[Any]) -> list[Any]:
        return [named.get(atom, atom) if is_variable(atom) else atom for atom in atoms]

    equations = []
    for eqn in jaxpr.eqns:
        operands = unnamed(eqn.invars)
        if eqn.primitive.name == "name":
            named[eqn.outvars[0]] = operands[0]
        else:
            equations.append(eqn.replace(invars=operands))
    results = unnamed(jaxpr.outvars)
    needed = set(only_variables(results))
    live = []
    for eqn in reversed(equations):
        if not needed.isdisjoint(eqn.outvars):
            needed.update(only_variables(eqn.invars))
            live.append(eqn)
    return jaxpr.replace(eqns=live[::-1], outvars=results)


def _follow_equation(eqn: core.JaxprEqn, marks: list[bool]) -> list[bool]:
    name = eqn.primitive.name
    if name.startswith(_OPAQUE):
        raise _Mixed
    if name in ("iota", "random_bits") and _batch_axes(eqn.outvars[0].aval):
        raise _Mixed
    inner = _inner(eqn)
    if name in _CALLS:
        return _follow(inner[0], marks)
    if not any(marks):
        return [False] * len(eqn.outvars)
    if name == "scan":
        return _follow_scan(eqn, inner[0], marks)
    if name == "cond":
        branches = [_follow(branch, marks[1:]) for branch in inner]
        return [any(results) for results in zip(*branches, strict=True)]
    if name == "while":
        return _follow_while(eqn, marks)
    if _mixes(eqn, marks):
        raise _Mixed
    return [True] * len(eqn.outvars)


def _mixes(eqn: core.JaxprEqn, marks: Sequence[bool]) -> bool:
    """Return whether one operation works along the axis of the batch."""
    name, params = eqn.primitive.name, eqn.params
    first: Any = eqn.invars[0].aval
    axes = _batch_axes(first) if marks[0] else []
    if name in _IN_ORDER:
        along = [params[key] for key in _ALONG if key in params] or [-1]
        rank = len(first.shape)
        return any(axis % rank in axes for axis in jax.tree.leaves(along))
    if name == "conv_general_dilated":
        return axes != [params["dimension_numbers"].lhs_spec[0]]
    if name in ("gather", "scatter", "scatter-add", "dynamic_slice", "dynamic_update_slice"):
        moved = getattr(params.get("dimension_numbers"), "start_index_map", None)
        return any(axis in axes for axis in moved) if moved is not None else name != "gather"
    if "window_dimensions" in params:
        return any(params["window_dimensions"][axis] != 1 for axis in axes)
    return False


def _batch_axes(aval: Any) -> list[int]:
    """Return the axes that the batch is in, alone or folded with others; twice if squared."""
    axes = [axis for axis, size in enumerate(aval.shape) if size and size % PROBE == 0]
    return axes + [axis for axis in axes if aval.shape[axis] % PROBE**2 == 0]


def _follow_scan(eqn: core.JaxprEqn, body: core.Jaxpr, marks: list[bool]) -> list[bool]:
    constant, carried = constant_and_carried(eqn)
    if eqn.params["length"] % PROBE == 0:  # a loop over the samples
        if carried or any(marks[:constant]):
            raise _Mixed
        return [True] * len(eqn.outvars)
    carry = marks[constant : constant + carried]
    while True:
        results = _follow(body, [*marks[:constant], *carry, *marks[constant + carried :]])
        if results[:carried] == carry:
            return results
        carry = [a or b for a, b in zip(carry, results[:carried], strict=True)]


def _follow_while(eqn: core.JaxprEqn, marks: list[bool]) -> list[bool]:
    n_test, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, constants, carry = (
        marks[:n_test],
        marks[n_test : n_test + n_body],
        marks[n_test + n_body :],
    )
    while True:
        _follow(eqn.params["cond_jaxpr"].jaxpr, [*test, *carry])
        results = _follow(eqn.params["body_jaxpr"].jaxpr, [*constants, *carry])
        if results == carry:
            return carry
        carry = [a or b for a, b in zip(carry, results, strict=True)]
