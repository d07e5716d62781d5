"""A traced model, cut into cells: what becomes one Keras layer each.

The model is traced to a jaxpr in which the inputs and outputs of every submodule carry a tag. The
jaxpr is cut at the tags and at the ReLUs; what lies between two cuts, sliced backwards from its
outputs so that nothing dead is computed, is a cell.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from .bridge import JaxFunction

_TAG = "xplique_flax"
_TRACED_SIZES = (2, 3)
_INLINED = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
_CALLS = {"custom_jvp_call": "custom_jvp", "custom_vjp_call": "custom_vjp"}
UNUSED = "unused"

Ref = tuple[int, int]
MODEL_INPUT: Ref = (-1, 0)


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
        key: checkpoint_name(array, f"{_TAG}:{kind}:{index}/{len(arrays)}:{path}")
        for index, (key, array) in enumerate(arrays.items())
    }
    return jax.tree.unflatten(structure, [tagged.get(id(leaf), leaf) for leaf in leaves])


@dataclass(frozen=True)
class Value:
    """What is known of a cell's output: each dimension is ``slope * batch + offset``."""

    dims: tuple[tuple[int, int], ...]
    dtype: str

    def shape(self, batch: int | None) -> tuple[int | None, ...]:
        """Return the shape at a batch size, with ``None`` for what depends on an unknown one."""
        if batch is None:
            return tuple(None if slope else offset for slope, offset in self.dims)
        return tuple(slope * batch + offset for slope, offset in self.dims)

    @property
    def is_floating(self) -> bool:
        return self.dtype == "float32"


@dataclass(frozen=True)
class Cell:
    """One node of the graph: one call of one layer."""

    layer: str
    inputs: tuple[Ref, ...]
    outputs: tuple[Value, ...]
    leaves: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    batch: tuple[int, int, int] = (0, 0, 1)
    relu: float | None = None
    filters: int | None = None
    hidden_relu: str | None = None

    def batch_size(self, shapes: Sequence[Sequence[int | None]]) -> int | None:
        """Derive the model's batch size from the shapes of this cell's inputs."""
        index, axis, slope = self.batch
        size = shapes[index][axis]
        return None if size is None else size // slope


@dataclass
class _Slice:
    """The part of a jaxpr that computes some variables from the cuts before them."""

    kind: str
    path: str
    variables: list[Any]
    equations: list[int] = field(default_factory=list)
    inputs: dict[Ref, Any] = field(default_factory=dict)
    leaves: dict[int, Any] = field(default_factory=dict)
    ceiling: float | None = None
    tagged: list[Any] = field(default_factory=list)


class _Trace:
    """The flat jaxpr at one batch size, and its slices."""

    def __init__(self, closed: core.ClosedJaxpr, n_leaves: int) -> None:
        self.jaxpr = closed.jaxpr
        self.consts = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        self.leaves = {var: i for i, var in enumerate(self.jaxpr.invars[:n_leaves])}
        self.slices: list[_Slice] = []
        self.hidden: dict[str, str] = {}
        self.hidden_relus: dict[int, str] = {}
        self._producer = {var: i for i, eqn in enumerate(self.jaxpr.eqns) for var in eqn.outvars}
        model_input = self.jaxpr.invars[n_leaves]
        self._cuts: dict[Any, Ref] = {model_input: MODEL_INPUT}
        self._dependent = {model_input}
        self._cut()

    def _cut(self) -> None:
        scopes: list[str] = [""]
        group: list[Any] = []
        for index, eqn in enumerate(self.jaxpr.eqns):
            depends = not self._dependent.isdisjoint(_variables(eqn.invars))
            if depends:
                self._dependent.update(eqn.outvars)
            mark = _parse_tag(eqn)
            if mark is not None:
                kind, position, count, path = mark
                group = [*group, eqn] if position else [eqn]
                if len(group) == count:
                    self._cut_at_module(kind, path, group, scopes)
            elif depends:
                ceiling = _relu_ceiling(eqn)
                if ceiling is None:
                    self._record_hidden(index, eqn)
                else:
                    self._glue(scopes[-1], eqn.invars)
                    relu = _Slice("relu", scopes[-1], list(eqn.outvars), ceiling=ceiling)
                    relu.inputs = {self._cuts[eqn.invars[0]]: eqn.invars[0]}
                    self._add(relu, eqn.outvars)
        output = self.jaxpr.outvars[0]
        self._glue("", [output])
        if isinstance(output, core.Literal) or output not in self._cuts:
            self._add(self._slice("glue", "", [output]), [output])
            self.output: Ref = (len(self.slices) - 1, 0)
        else:
            self.output = self._cuts[output]

    def _cut_at_module(
        self, kind: str, path: str, group: Sequence[core.JaxprEqn], scopes: list[str]
    ) -> None:
        # What does not depend on the model's input is folded into the cells that use it.
        group = [eqn for eqn in group if eqn.outvars[0] in self._dependent]
        before = [eqn.invars[0] for eqn in group]
        after = [eqn.outvars[0] for eqn in group]
        if kind == "in":
            self._glue(scopes[-1], before)
            self._cuts.update(
                (new, self._cuts[old]) for old, new in zip(before, after, strict=True)
            )
            scopes.append(path)
            return
        while path in scopes:
            scopes.pop()
        if group:
            part = self._slice("out", path, before)
            part.tagged = after
            self._add(part, before, after)

    def _glue(self, scope: str, variables: Iterable[Any]) -> None:
        """Give what was computed since the last cuts a cell of its own."""
        missing = [
            var
            for var in dict.fromkeys(v for v in variables if not isinstance(v, core.Literal))
            if var in self._dependent and var not in self._cuts
        ]
        if missing:
            self._add(self._slice("glue", scope, missing), missing)

    def _add(self, part: _Slice, *names: Sequence[Any]) -> None:
        self.slices.append(part)
        for variables in names:
            for i, var in enumerate(variables):
                if not isinstance(var, core.Literal) and var in self._dependent:
                    # What is computed already keeps its cut; the tagged alias gets the new one.
                    self._cuts.setdefault(var, (len(self.slices) - 1, i))

    def _slice(self, kind: str, path: str, variables: list[Any]) -> _Slice:
        part = _Slice(kind, path, variables)
        part.equations = self._needed(variables, self._cuts)
        used = [v for i in part.equations for v in self.jaxpr.eqns[i].invars]
        for var in _variables([*used, *variables]):
            if var in self._cuts:
                part.inputs.setdefault(self._cuts[var], var)
            elif var in self.leaves:
                part.leaves.setdefault(self.leaves[var], var)
        return part

    def _needed(self, variables: Iterable[Any], stops: Container[Any]) -> list[int]:
        """Return the equations that compute some variables from those to stop at."""
        needed: set[int] = set()
        pending = _variables(variables)
        while pending:
            var = pending.pop()
            index = None if var in stops else self._producer.get(var)
            if index is not None and index not in needed:
                needed.add(index)
                pending += _variables(self.jaxpr.eqns[index].invars)
        return sorted(needed)

    def _record_hidden(self, index: int, eqn: core.JaxprEqn) -> None:
        reason = _CALLS.get(eqn.primitive.name, eqn.primitive.name)
        for inner in _equations_within(eqn):
            mark = _parse_tag(inner)
            if mark is not None:
                self.hidden[mark[3]] = reason
            elif _relu_ceiling(inner) is not None:
                self.hidden_relus[index] = reason

    def run(self, part: _Slice, leaves: Mapping[int, Any], inputs: dict[Ref, Any]) -> list[Any]:
        """Evaluate a slice; an input arrives in float32 and is computed on in its own dtype."""
        arguments = {var: leaves[i] for i, var in part.leaves.items()}
        for ref, var in part.inputs.items():
            arguments[var] = inputs[ref].astype(var.aval.dtype)
        for var, cut in self._cuts.items():
            # Several variables can stand for one cut: a tagged value and the value itself.
            if cut in part.inputs and var not in arguments:
                arguments[var] = arguments[part.inputs[cut]]
        body = self.jaxpr.replace(
            constvars=list(self.consts),
            invars=list(arguments),
            outvars=part.variables,
            eqns=[self.jaxpr.eqns[i] for i in part.equations],
        )
        return jax.core.eval_jaxpr(body, list(self.consts.values()), *arguments.values())

    def prefix(self, ref: Ref, leaves: Sequence[Any], inputs: Any) -> Any:
        """Evaluate everything up to one output of one slice, tags included."""
        part = self.slices[ref[0]]
        output = (part.tagged or part.variables)[ref[1]]
        body = self.jaxpr.replace(
            constvars=list(self.consts),
            outvars=[output],
            eqns=[self.jaxpr.eqns[i] for i in self._needed([output], ())],
        )
        return jax.core.eval_jaxpr(body, list(self.consts.values()), *leaves, inputs)[0]


class ModelFunction(Protocol):
    """A model as a function of its parameters, as a flat list, and a batch of inputs."""

    name: str
    leaves: list[Any]
    leaf_names: list[str]

    def __call__(self, leaves: Sequence[Any], inputs: Any) -> Any:
        """Return the explained output."""

    def tagged(self, leaves: Sequence[Any], inputs: Any) -> Any:
        """Do the same, with the inputs and outputs of the submodules tagged."""


class Graph:
    """The cells of a model, found for one shape of a sample.

    Parameters
    ----------
    function
        The model.
    input_shape
        The shape of one sample.
    """

    def __init__(self, function: ModelFunction, input_shape: tuple[int, ...]) -> None:
        self._function = function.tagged
        self._leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in function.leaves]
        self.input_shape = input_shape
        self._trace = functools.lru_cache(maxsize=16)(self._make_trace)
        small, large = (self._make_trace(size) for size in _TRACED_SIZES)
        self.output = small.output
        self.convolution_ranks = {
            len(eqn.params["dimension_numbers"].out_spec)
            for eqn in _all_equations(small.jaxpr)
            if eqn.primitive.name == "conv_general_dilated"
        }
        self.cells = self._name(small, large)
        self.hidden = self._hidden_layers(small)
        self._functions: dict[int, JaxFunction] = {}

    def _make_trace(self, batch: int) -> _Trace:
        inputs = jax.ShapeDtypeStruct((batch, *self.input_shape), jnp.float32)
        closed = jax.make_jaxpr(self._function)(self._leaves, inputs)
        flat = jax.make_jaxpr(functools.partial(_inline, closed.jaxpr, closed.consts))(
            *self._leaves, inputs
        )
        return _Trace(flat, len(self._leaves))

    def _name(self, small: _Trace, large: _Trace) -> list[Cell]:
        taken = {part.path for part in small.slices if part.kind == "out"}
        self.input_name = _unique("inputs", taken)
        cells: list[Cell] = []
        for part, other in zip(small.slices, large.slices, strict=True):
            outputs = tuple(
                _value(a.aval, b.aval) for a, b in zip(part.variables, other.variables, strict=True)
            )
            inputs = tuple(part.inputs) or (MODEL_INPUT,)
            sources = [self._source(cells, ref) for ref in inputs]
            batch = _batch_axis(sources)
            if batch is None:
                inputs = (*inputs, MODEL_INPUT)
                batch = (len(inputs) - 1, 0, 1)
            equations = [small.jaxpr.eqns[i] for i in part.equations]
            hidden = [small.hidden_relus[i] for i in part.equations if i in small.hidden_relus]
            cells.append(
                Cell(
                    layer=self._layer_name(part, equations, taken),
                    inputs=inputs,
                    outputs=outputs,
                    leaves=tuple(part.leaves),
                    batch=batch,
                    relu=part.ceiling,
                    filters=_filters(equations, outputs),
                    hidden_relu=hidden[0] if hidden else None,
                )
            )
        return self._share(cells)

    def _source(self, cells: Sequence[Cell], ref: Ref) -> Value:
        if ref == MODEL_INPUT:
            return Value(((1, 0), *((0, size) for size in self.input_shape)), "float32")
        return cells[ref[0]].outputs[ref[1]]

    @staticmethod
    def _layer_name(part: _Slice, equations: Sequence[core.JaxprEqn], taken: set[str]) -> str:
        if part.kind == "out":
            return part.path
        operation = "relu" if part.kind == "relu" else _operation(equations)
        base = f"{part.path}.{operation}" if part.path else operation
        return _unique(base, taken)

    @staticmethod
    def _share(cells: list[Cell]) -> list[Cell]:
        """Take the parameters that several layers use out of their cells' own ones."""
        users: dict[int, set[str]] = {}
        for cell in cells:
            for leaf in cell.leaves:
                users.setdefault(leaf, set()).add(cell.layer)
        return [
            replace(
                cell,
                leaves=tuple(leaf for leaf in cell.leaves if len(users[leaf]) == 1),
                shared=tuple(leaf for leaf in cell.leaves if len(users[leaf]) > 1),
            )
            for cell in cells
        ]

    def _hidden_layers(self, trace: _Trace) -> dict[str, str]:
        reached = set()
        pending = [self.output[0]]
        while pending:
            index = pending.pop()
            if index >= 0 and index not in reached:
                reached.add(index)
                pending += [source for source, _ in self.cells[index].inputs]
        shown = {self.cells[index].layer for index in reached}
        unused = {cell.layer: UNUSED for cell in self.cells if cell.layer not in shown}
        return {name: why for name, why in {**unused, **trace.hidden}.items() if name not in shown}

    def function_of(self, index: int) -> JaxFunction:
        """Return one cell as a function of its layer's parameters and its tensors.

        The tensors are the cell's inputs, then the shared parameters that it uses. The function
        is the same one at each request: layers that were cloned are not compiled again.
        """
        if index not in self._functions:
            cell = self.cells[index]

            def function(own: dict[int, Any], *tensors: Any) -> tuple:
                split = len(cell.inputs)
                return self.run(index, own, tensors[split:], tensors[:split])

            sources = [self._source(self.cells, ref) for ref in cell.inputs]
            floating = [value.is_floating for value in sources] + [True] * len(cell.shared)
            outputs = [value.is_floating for value in cell.outputs]
            self._functions[index] = JaxFunction(function, floating, outputs)
        return self._functions[index]

    def run(
        self, index: int, own: dict[int, Any], shared: Sequence[Any], inputs: Sequence[Any]
    ) -> tuple:
        """Evaluate one cell; floating outputs are float32.

        Parameters
        ----------
        index
            The cell's number.
        own
            The parameters that the cell's layer owns, by their number.
        shared
            The values of ``Cell.shared``.
        inputs
            The values of ``Cell.inputs``.
        """
        cell = self.cells[index]
        batch = cell.batch_size([value.shape for value in inputs])
        if not batch:
            return tuple(jnp.zeros(value.shape(0), value.dtype) for value in cell.outputs)
        trace = self._trace(batch)
        part = trace.slices[index] if len(trace.slices) == len(self.cells) else None
        if part is None or not set(part.inputs) <= set(cell.inputs):
            raise ValueError(
                f"The model does other things for a batch of {batch} samples than for one of "
                f"{_TRACED_SIZES[0]}: its layers can't be addressed at this batch size. Use "
                "another `batch_size`, or a method that does not look inside the model."
            )
        leaves = own | dict(zip(cell.shared, shared, strict=True))
        values = trace.run(part, leaves, dict(zip(cell.inputs, inputs, strict=True)))
        return tuple(
            value.astype(spec.dtype) for value, spec in zip(values, cell.outputs, strict=True)
        )

    def prefix(self, layer: str, leaves: Sequence[Any], inputs: Any) -> Any:
        """Evaluate the model up to the first call of a layer, with the tags in it."""
        index = next(i for i, cell in enumerate(self.cells) if cell.layer == layer)
        return self._trace(inputs.shape[0]).prefix((index, 0), leaves, inputs)


def _inline(jaxpr: core.Jaxpr, consts: Sequence[Any], *arguments: Any) -> list[Any]:
    """Evaluate a jaxpr, with the calls that have a tag or a ReLU in them inlined."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in _INLINED and any(map(_is_mark, _equations_within(eqn))):
            inner = eqn.params["jaxpr"]
            if isinstance(inner, core.ClosedJaxpr):
                results = _inline(inner.jaxpr, inner.consts, *values)
            else:
                results = _inline(inner, (), *values)
        else:
            results = _bind(jaxpr, eqn, values)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    bound = {atom: v for atom, v in zip(eqn.invars, values, strict=True) if _is_variable(atom)}
    single = jaxpr.replace(constvars=[], invars=list(bound), outvars=eqn.outvars, eqns=[eqn])
    return jax.core.eval_jaxpr(single, (), *bound.values())


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if _is_variable(atom)]


def _equations_within(eqn: core.JaxprEqn) -> Iterator[core.JaxprEqn]:
    for jaxpr in core.jaxprs_in_params(eqn.params):
        yield from _all_equations(jaxpr)


def _all_equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        yield from _equations_within(eqn)


def _is_mark(eqn: core.JaxprEqn) -> bool:
    return _parse_tag(eqn) is not None or _relu_ceiling(eqn) is not None


def _parse_tag(eqn: core.JaxprEqn) -> tuple[str, int, int, str] | None:
    if eqn.primitive.name != "name" or not eqn.params["name"].startswith(f"{_TAG}:"):
        return None
    _, kind, counts, path = eqn.params["name"].split(":", 3)
    position, count = map(int, counts.split("/"))
    return kind, position, count, path


def _relu_ceiling(eqn: core.JaxprEqn) -> float | None:
    """Return where a ReLU saturates, infinity for a plain one; ``None`` if it is no ReLU.

    A function is a ReLU by its name and by what it computes: a user's own ``relu`` may be another.
    """
    if eqn.primitive.name != "custom_jvp_call":
        return None
    inner = list(_equations_within(eqn))
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


def _value(small: Any, large: Any) -> Value:
    first, second = _TRACED_SIZES
    dims = []
    for a, b in zip(small.shape, large.shape, strict=True):
        slope = (b - a) // (second - first)
        dims.append((slope, a - slope * first))
    floating = jnp.issubdtype(small.dtype, jnp.floating)
    return Value(tuple(dims), "float32" if floating else str(small.dtype))


def _batch_axis(sources: Sequence[Value]) -> tuple[int, int, int] | None:
    for index, value in enumerate(sources):
        for axis, (slope, offset) in enumerate(value.dims):
            if slope > 0 and offset == 0:
                return index, axis, slope
    return None


def _filters(equations: Sequence[core.JaxprEqn], outputs: Sequence[Value]) -> int | None:
    """Return the number of channels where the cell is a convolution, as Keras layers have it."""
    for eqn in equations:
        nested = eqn.primitive.name in _INLINED and _equations_within(eqn)
        names = [eqn.primitive.name, *(inner.primitive.name for inner in nested or ())]
        if "conv_general_dilated" in names and len(outputs) == 1 and len(outputs[0].dims) > 2:
            return outputs[0].dims[-1][1]
    return None


def _unique(base: str, taken: set[str]) -> str:
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name


def _operation(equations: Sequence[core.JaxprEqn]) -> str:
    if not equations:
        return "identity"
    last = equations[-1]
    return str(last.params.get("name", last.primitive.name)).strip("_")
