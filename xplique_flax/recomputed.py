"""What a gradient computes again, which takes less time than to keep it."""

from __future__ import annotations

from typing import Any

from jax.extend import core

from .jaxprs import ELEMENTWISE, NOTHING, Recomputed, equations_within, only_variables

# For fewer numbers, there is nothing to gain.
_FEWEST_NUMBERS = 2**17
# XLA computes anything cheaper again by itself, for each operation that reads it.
_COSTLY = (
    *("cbrt", "cos", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "log", "log1p"),
    *("logistic", "pow", "rsqrt", "sin", "sqrt", "tan", "tanh"),
)
_REPEATABLE = ELEMENTWISE | {"broadcast_in_dim", "reshape", "squeeze"}
_CALLS = {"custom_jvp_call", "jit"}


def recomputed(jaxpr: core.Jaxpr, cotangents: int) -> Recomputed:
    """Find what a gradient reads of the forward pass, and can compute from other values.

    An activation such as ``silu`` or ``gelu`` keeps several arrays for its gradient: what it was
    given, an exponential function of it, and more. All of them belong to the one that they are
    computed from, a number at a time, which alone is kept. The gradient of EfficientNet takes
    six tenths of the memory, and nine tenths of the time; that of ConvNeXt as well.

    Parameters
    ----------
    jaxpr
        The jaxpr; what is inside of its calls is one operation.
    cotangents
        How many of its last arguments are cotangents. What depends on them is the gradient.

    Returns
    -------
    recomputed
        What to compute again; nothing without cotangents.
    """
    if not cotangents:
        return NOTHING
    readers, read = _gradient(jaxpr, cotangents)
    makers: dict[Any, core.JaxprEqn | None] = {}
    origins: dict[Any, Any] = {}
    sources: dict[Any, set[Any]] = {}  # which arrays XLA would keep for each
    for number, eqn in enumerate(jaxpr.eqns):
        names = {e.primitive.name for e in (eqn, *equations_within(eqn))} - _CALLS
        if number in readers or not names <= _REPEATABLE:
            continue
        for variable in eqn.outvars:
            whole = [a for a in only_variables(eqn.invars) if _size(a) == _size(variable)]
            # What is spread from fewer numbers has no origin: XLA computes it again by itself.
            found = {origins.get(array, array) for array in whole} - {None}
            if len(found) > 1 or _size(variable) < _FEWEST_NUMBERS:
                continue
            origins[variable] = found.pop() if found else None
            makers[variable] = eqn
            sources[variable] = set().union(*(sources.get(array, {array}) for array in whole))
            if not names.isdisjoint(_COSTLY):
                sources[variable] = {variable}
    families: dict[Any, set[Any]] = {}
    for variable in read:
        if getattr(variable.aval, "dtype", "bool") != "bool":
            family = families.setdefault(origins.get(variable, variable), set())
            family |= sources.get(variable, {variable})
    kept = {origin for origin, family in families.items() if origin and len(family) > 1}
    makers = {variable: eqn for variable, eqn in makers.items() if origins[variable] in kept}
    return Recomputed(readers, makers | dict.fromkeys(kept))


def _gradient(jaxpr: core.Jaxpr, cotangents: int) -> tuple[set[int], set[Any]]:
    """Return the equations of the gradient, by number, and what they read."""
    gradient = set(jaxpr.invars[-cotangents:])
    numbers: set[int] = set()
    read: set[Any] = set()
    for number, eqn in enumerate(jaxpr.eqns):
        operands = only_variables(eqn.invars)
        if not gradient.isdisjoint(operands):
            gradient.update(eqn.outvars)
            numbers.add(number)
            read.update(operands)
    return numbers, read


def _size(variable: Any) -> int:
    return getattr(variable.aval, "size", 1)
