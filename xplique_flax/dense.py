"""Small networks of dense layers, as operations of TensorFlow.

Such a network takes less time than TensorFlow's call of Python, without which the whole
explanation of a perceptron takes up to a tenth less time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from jax.extend import core

from .jaxprs import CALLS, all_equations, called, is_variable, relu_ceiling
from .samples import PROBE

# With more, XLA's products with transposed matrices are up to twice as fast as TensorFlow's.
_MOST_PARAMETERS = 2**17
_OTHER_SIZE = 1013

# Only what has the same gradient in TensorFlow, at the points too where it has none.
_SAME = {
    "add": tf.add,
    "copy": tf.identity,
    "div": tf.divide,
    "eq": tf.equal,
    "exp": tf.exp,
    "expm1": tf.math.expm1,
    "ge": tf.greater_equal,
    "gt": tf.greater,
    "le": tf.less_equal,
    "log": tf.math.log,
    "log1p": tf.math.log1p,
    "logistic": tf.sigmoid,
    "lt": tf.less,
    "mul": tf.multiply,
    "name": tf.identity,
    "neg": tf.negative,
    "rsqrt": tf.math.rsqrt,
    "sqrt": tf.sqrt,
    "square": tf.square,
    "stop_gradient": tf.stop_gradient,
    "sub": tf.subtract,
    "tanh": tf.tanh,
}
_REDUCTIONS = {"reduce_max": tf.reduce_max, "reduce_sum": tf.reduce_sum}
_RELUS: dict[float | None, Callable] = {math.inf: tf.nn.relu, 6.0: tf.nn.relu6}
_POWERS: dict[int, Callable] = {2: tf.square, 3: lambda x: tf.square(x) * x}


class _Unknown(Exception):
    """Something that is left to JAX."""


class _Value(NamedTuple):
    """What is known of a variable: its number, or its value if it is a constant."""

    number: int | None
    constant: Any
    depends_on_inputs: bool = False
    has_gradient: bool = False


class _Step(NamedTuple):
    operation: Callable[..., tf.Tensor]
    operands: list[_Value]


class DenseNetwork:
    """A traced model as operations of TensorFlow.

    Values that do not depend on the inputs have a batch of one, where the model has the whole
    batch: TensorFlow's operations spread it.

    Parameters
    ----------
    traced
        The model, traced for a batch of `PROBE` samples; the inputs are the last argument.
    """

    def __init__(self, traced: core.ClosedJaxpr) -> None:
        jaxpr = traced.jaxpr
        self._steps: list[_Step] = []
        self._count: int = len(jaxpr.invars)
        last = self._count - 1
        arguments = [_Value(i, None, i == last, i == last) for i in range(self._count)]
        (self._output,) = self._add(traced, arguments)
        if not self._output.has_gradient:  # which TensorFlow's would be None, and JAX's zeros
            raise _Unknown
        read = {operand.number for step in self._steps for operand in step.operands}
        self.parameters = [i for i in range(last) if i in read]
        """The numbers of the parameters that are read."""

    def __call__(self, parameters: Mapping[int, Any], inputs: tf.Tensor) -> tf.Tensor:
        """Return the outputs, given the parameters by their numbers."""
        first = self._count - len(self._steps)
        values: dict[Any, Any] = {**parameters, first - 1: inputs}
        for number, step in enumerate(self._steps, first):
            operands = [
                operand.constant if operand.number is None else values[operand.number]
                for operand in step.operands
            ]
            values[number] = step.operation(*operands)
        return values[self._output.number]

    def _add(self, closed: core.ClosedJaxpr, arguments: Sequence[_Value]) -> list[_Value]:
        jaxpr = closed.jaxpr
        env = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, value in zip(jaxpr.constvars, closed.consts, strict=True):
            env[variable] = _constant(value, variable.aval)

        def read(atom: Any) -> _Value:
            return env[atom] if is_variable(atom) else _constant(atom.val, atom.aval)

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if eqn.primitive.name in CALLS:
                results = self._add(called(eqn), operands)
            else:
                depends = [operand.depends_on_inputs for operand in operands]
                self._steps.append(_Step(_operation(eqn, depends), operands))
                passes = (
                    eqn.primitive.name != "stop_gradient" and _aval(eqn.outvars[0]).dtype != bool
                )
                has_gradient = passes and any(operand.has_gradient for operand in operands)
                results = [_Value(self._count, None, any(depends), has_gradient)]
                self._count += 1
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def is_small(arrays: Sequence[Any]) -> bool:
    """Return whether a network of dense layers with these parameters is quicker in TensorFlow."""
    return sum(math.prod(array.shape) for array in arrays) <= _MOST_PARAMETERS


def dense_network(trace: Callable[[int], core.ClosedJaxpr | None]) -> DenseNetwork | None:
    """Return a model as operations of TensorFlow, if it is small and made of known ones.

    Parameters
    ----------
    trace
        Returns the model, traced for a batch of a size.
    """
    try:
        return _dense_network(trace(PROBE), trace(_OTHER_SIZE))
    except Exception:  # whatever an operation has that is not understood
        return None


def _dense_network(traced: Any, other: Any) -> DenseNetwork:
    *parameters, inputs = traced.in_avals
    fixed = [*parameters, *map(np.asarray, traced.consts)]
    # The size of the batch must be known by its number.
    sizes = [size for array in (*fixed, inputs) for size in array.shape]
    if not is_small(fixed) or sizes.count(PROBE) > 1:
        raise _Unknown
    if _outline(traced, PROBE) != _outline(other, _OTHER_SIZE):
        raise _Unknown
    return DenseNetwork(traced)


def _outline(traced: core.ClosedJaxpr, size: int) -> list[Any]:
    """Return what a model does, with nothing in the place of the batch: its size may be a number.

    A model may multiply with the number of its samples, or make an array of twice that size.
    """

    def seen(atom: Any) -> Any:
        first, *others = atom.aval.shape or (None,)
        number = None if is_variable(atom) else np.asarray(atom.val).tolist()
        return None if first == size else first, others, number

    equations = [
        (eqn.primitive.name, [seen(atom) for atom in (*eqn.invars, *eqn.outvars)])
        for eqn in all_equations(traced.jaxpr)
    ]
    return [*equations, [np.asarray(value).tolist() for value in traced.consts]]


def _constant(value: Any, aval: Any) -> _Value:
    return _Value(None, np.asarray(value, aval.dtype))


def _operation(eqn: core.JaxprEqn, depends: Sequence[bool]) -> Callable[..., tf.Tensor]:
    """Return what computes an equation; ``depends`` tells which operands depend on the inputs."""
    name, avals = eqn.primitive.name, [_aval(atom) for atom in (*eqn.invars, *eqn.outvars)]
    if len(eqn.outvars) != 1 or {str(aval.dtype) for aval in avals} - {"float32", "bool"}:
        raise _Unknown
    if name in _SAME:
        return _SAME[name]
    if name in _OTHERS:
        return _OTHERS[name](eqn, depends)
    raise _Unknown


def _aval(atom: Any) -> Any:
    return atom.aval


def _relu(eqn: core.JaxprEqn, _: Any) -> Callable[..., tf.Tensor]:
    ceiling = relu_ceiling(eqn)
    if ceiling not in _RELUS:
        raise _Unknown
    return _RELUS[ceiling]


def _dot_general(eqn: core.JaxprEqn, depends: Sequence[bool]) -> Callable[..., tf.Tensor]:
    params = eqn.params
    is_layer = params["dimension_numbers"] == (((1,), (0,)), ((), ())) and not depends[1]
    if not is_layer or any(_aval(x).ndim != 2 for x in eqn.invars) or params["precision"]:
        raise _Unknown
    return tf.linalg.matmul


def _reduce(eqn: core.JaxprEqn, _: Any) -> Callable[..., tf.Tensor]:
    shape = _aval(eqn.invars[0]).shape
    if len(shape) != 2 or shape[0] != PROBE or tuple(eqn.params["axes"]) != (1,):
        raise _Unknown
    reduction = _REDUCTIONS[eqn.primitive.name]
    return lambda x: reduction(x, axis=1)


def _reshape(eqn: core.JaxprEqn, depends: Sequence[bool]) -> Callable[..., tf.Tensor]:
    before, after = _aval(eqn.invars[0]).shape, _aval(eqn.outvars[0]).shape
    if depends[0] and (before[0] != PROBE or after[0] != PROBE):
        raise _Unknown
    shape = [-1 if size == PROBE else size for size in after]
    return lambda x: tf.reshape(x, shape)


def _broadcast(eqn: core.JaxprEqn, depends: Sequence[bool]) -> Callable[..., tf.Tensor]:
    before, after = _aval(eqn.invars[0]).shape, _aval(eqn.outvars[0]).shape
    kept = dict(zip(eqn.params["broadcast_dimensions"], before, strict=True))
    placed = [kept.get(axis, 1) for axis in range(len(after))]
    shape = [-1 if size == PROBE else size for size in placed]
    if depends[0]:
        if placed != list(after) or after[0] != PROBE:
            raise _Unknown
        return lambda x: tf.reshape(x, shape)
    spread = [1 if size == PROBE else size for size in after]
    return lambda x: tf.broadcast_to(tf.reshape(x, shape), spread)


def _convert(eqn: core.JaxprEqn, _: Any) -> Callable[..., tf.Tensor]:
    if _aval(eqn.invars[0]).dtype != _aval(eqn.outvars[0]).dtype:
        raise _Unknown
    return tf.identity


def _integer_pow(eqn: core.JaxprEqn, _: Any) -> Callable[..., tf.Tensor]:
    if eqn.params["y"] not in _POWERS:
        raise _Unknown
    return _POWERS[eqn.params["y"]]


def _select(eqn: core.JaxprEqn, _: Any) -> Callable[..., tf.Tensor]:
    which, *cases = map(_aval, eqn.invars)
    if which.dtype != bool or len(cases) != 2 or not which.shape == cases[0].shape:
        raise _Unknown
    return lambda which, otherwise, chosen: tf.where(which, chosen, otherwise)


def _max(eqn: core.JaxprEqn, _: Any) -> Callable[..., tf.Tensor]:
    if all(map(is_variable, eqn.invars)):
        raise _Unknown
    is_first = is_variable(eqn.invars[0])

    def maximum(first: Any, second: Any) -> tf.Tensor:
        x, bound = (first, second) if is_first else (second, first)
        # JAX's gradient is a half where the two are the same.
        return tf.where(x < bound, bound, tf.where(x == bound, 0.5 * x + 0.5 * bound, x))

    return maximum


_OTHERS: dict[str, Callable[[core.JaxprEqn, Sequence[bool]], Callable[..., tf.Tensor]]] = {
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "custom_jvp_call": _relu,
    "dot_general": _dot_general,
    "integer_pow": _integer_pow,
    "max": _max,
    "reduce_max": _reduce,
    "reduce_sum": _reduce,
    "reshape": _reshape,
    "select_n": _select,
}
