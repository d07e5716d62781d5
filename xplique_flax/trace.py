"""A traced model, cut at the tags of its submodules and at its ReLUs.

What lies between two cuts, sliced backwards from its outputs so that nothing dead is computed, is
one slice.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend import core

from .jaxprs import enclosing_operation, equations_within, only_variables, parse_tag, relu_ceiling

Ref = tuple[int, int]
MODEL_INPUT: Ref = (-1, 0)


@dataclass
class Slice:
    """The part of a jaxpr that computes some variables from the cuts before them."""

    kind: str
    path: str
    variables: list[Any]
    equations: list[int] = field(default_factory=list)
    inputs: dict[Ref, Any] = field(default_factory=dict)
    leaves: dict[int, Any] = field(default_factory=dict)
    ceiling: float | None = None
    tagged: list[Any] = field(default_factory=list)


class Trace:
    """The flat jaxpr at one batch size, and its slices."""

    def __init__(self, closed: core.ClosedJaxpr, n_leaves: int) -> None:
        self.jaxpr = closed.jaxpr
        self.consts = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        self.leaves = {var: i for i, var in enumerate(self.jaxpr.invars[:n_leaves])}
        self.slices: list[Slice] = []
        self.hidden: dict[str, str] = {}
        self.hidden_relus: dict[int, str] = {}
        self._producer = {var: i for i, eqn in enumerate(self.jaxpr.eqns) for var in eqn.outvars}
        self._live = self._needed(self.jaxpr.outvars, ())
        model_input = self.jaxpr.invars[n_leaves]
        self._cuts: dict[Any, Ref] = {model_input: MODEL_INPUT}
        self._dependent = {model_input}
        self._cut()

    def _cut(self) -> None:
        scopes: list[str] = [""]
        for (kind, path, _), group in itertools.groupby(self._marked(), key=lambda mark: mark[0]):
            equations = [index for _, index in group]
            if kind in ("in", "out"):
                self._cut_at_module(kind, path, equations, scopes)
            elif kind == "name":
                for index in equations:
                    self._cut_at_name(index, path)
            else:
                for index in equations:
                    self._cut_at_relu(index, scopes[-1])
        output = self.jaxpr.outvars[0]
        self._glue("", [output])
        if isinstance(output, core.Literal) or output not in self._cuts:
            self._add(self._slice("glue", "", [output]), [output])
            self.output: Ref = (len(self.slices) - 1, 0)
        else:
            self.output = self._cuts[output]

    def _marked(self) -> Iterator[tuple[tuple[str, str, int], int]]:
        """Yield the live equations to cut at, with what tells one call of a module from the next.

        Tags of outputs that nothing needs are dead: a module has the outputs that are used.
        """
        call = position = 0
        for index in self._live:
            eqn = self.jaxpr.eqns[index]
            depends = not self._dependent.isdisjoint(only_variables(eqn.invars))
            if depends:
                self._dependent.update(eqn.outvars)
            mark = parse_tag(eqn)
            if mark is not None:
                kind, next_position, path = mark
                call += next_position <= position
                position = next_position
                if depends:
                    # What does not depend on the model's input is folded into what uses it.
                    yield (kind, path, call), index
                continue
            call, position = call + 1, -1
            if depends and relu_ceiling(eqn) is not None:
                yield ("relu", "", call), index
            elif depends:
                self._record_hidden(index, eqn)

    def _cut_at_relu(self, index: int, scope: str) -> None:
        eqn = self.jaxpr.eqns[index]
        self._glue(scope, eqn.invars)
        relu = Slice("relu", scope, list(eqn.outvars), [index], ceiling=relu_ceiling(eqn))
        relu.inputs = {self._cuts[eqn.invars[0]]: eqn.invars[0]}
        self._add(relu, eqn.outvars)

    def _cut_at_name(self, index: int, name: str) -> None:
        eqn = self.jaxpr.eqns[index]
        part = self._slice("name", name, list(eqn.invars))
        part.tagged = list(eqn.outvars)
        self._add(part, eqn.invars, eqn.outvars)

    def _cut_at_module(
        self, kind: str, path: str, equations: Sequence[int], scopes: list[str]
    ) -> None:
        group = [self.jaxpr.eqns[index] for index in equations]
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

    def _add(self, part: Slice, *names: Sequence[Any]) -> None:
        self.slices.append(part)
        for variables in names:
            for i, var in enumerate(variables):
                if not isinstance(var, core.Literal) and var in self._dependent:
                    # What is computed already keeps its cut; the tagged alias gets the new one.
                    self._cuts.setdefault(var, (len(self.slices) - 1, i))

    def _slice(self, kind: str, path: str, variables: list[Any]) -> Slice:
        part = Slice(kind, path, variables)
        part.equations = self._needed(variables, self._cuts)
        used = [v for i in part.equations for v in self.jaxpr.eqns[i].invars]
        for var in only_variables([*used, *variables]):
            if var in self._cuts:
                part.inputs.setdefault(self._cuts[var], var)
            elif var in self.leaves:
                part.leaves.setdefault(self.leaves[var], var)
        return part

    def _needed(self, variables: Iterable[Any], stops: Container[Any]) -> list[int]:
        """Return the equations that compute some variables from those to stop at."""
        needed: set[int] = set()
        pending = only_variables(variables)
        while pending:
            var = pending.pop()
            index = None if var in stops else self._producer.get(var)
            if index is not None and index not in needed:
                needed.add(index)
                pending += only_variables(self.jaxpr.eqns[index].invars)
        return sorted(needed)

    def _record_hidden(self, index: int, eqn: core.JaxprEqn) -> None:
        reason = enclosing_operation(eqn)
        for inner in equations_within(eqn):
            mark = parse_tag(inner)
            if mark is not None:
                self.hidden[mark[2]] = reason
            elif relu_ceiling(inner) is not None:
                self.hidden_relus[index] = reason

    def unused(self) -> set[str]:
        """Return the paths of the modules that the output does not depend on."""
        marks = {i: parse_tag(eqn) for i, eqn in enumerate(self.jaxpr.eqns)}
        tagged = {i: mark[2] for i, mark in marks.items() if mark is not None}
        return set(tagged.values()) - {tagged[i] for i in self._live if i in tagged}

    def run(self, part: Slice, leaves: Mapping[int, Any], inputs: dict[Ref, Any]) -> list[Any]:
        """Evaluate a slice; an input arrives in float32 and is computed on in its own dtype."""
        arguments = {var: leaves[i].astype(var.aval.dtype) for i, var in part.leaves.items()}
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

    def suffix(self, ref: Ref, leaves: Sequence[Any], value: Any) -> Any:
        """Evaluate everything after one output of one slice, tags included."""
        known = [var for var, cut in self._cuts.items() if cut == ref]
        output = self.jaxpr.outvars[0]
        equations = self._needed([output], set(known))
        body = self.jaxpr.replace(
            constvars=list(self.consts),
            invars=[*self.leaves, *known],
            outvars=[output],
            eqns=[self.jaxpr.eqns[i] for i in equations],
        )
        values = [value.astype(var.aval.dtype) for var in known]
        return jax.core.eval_jaxpr(body, list(self.consts.values()), *leaves, *values)[0]

    def is_bypassed(self, ref: Ref) -> bool:
        """Return whether the output depends on the inputs by another way than this cut."""
        known = {var for var, cut in self._cuts.items() if cut == ref}
        needed = self._needed(self.jaxpr.outvars, known)
        used = {v for i in needed for v in only_variables(self.jaxpr.eqns[i].invars)}
        return any(self._cuts.get(var) == MODEL_INPUT for var in used)

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
