"""The cells of a model: what becomes one call of one Keras layer each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core

from .batches import Batches
from .bridge import JaxFunction, Outline, within
from .devices import Devices
from .jaxprs import convolution_ranks, inline, is_convolution, operation_name
from .policies import Gradient, relu
from .samples import PROBE, Cost, cost_per_sample, traced_batch
from .trace import MODEL_INPUT, Ref, Slice, Trace

_SIZE, _OTHER_SIZE = 2, 3
UNUSED = "unused"


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

    def outline(self, batch: int) -> jax.ShapeDtypeStruct:
        """Return the shape and dtype at a batch size."""
        return jax.ShapeDtypeStruct(self.shape(batch), self.dtype)

    @property
    def is_floating(self) -> bool:
        return self.dtype == "float32"

    @property
    def has_gradient(self) -> bool:
        return self.is_floating or self.dtype.startswith("complex")


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


@dataclass(frozen=True)
class Section:
    """Some cells in a row, as one function of the model's parameters and what the cells read."""

    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    function: JaxFunction


class ModelFunction(Protocol):
    """A model as a function of its parameters, as a flat list, and a batch of inputs."""

    name: str
    leaves: list[Any]
    leaf_names: list[str]
    devices: Devices | None

    def __call__(self, leaves: Sequence[Any], inputs: Any) -> Any:
        """Return the explained output."""

    def tagged(self, leaves: Sequence[Any], inputs: Any) -> Any:
        """Do the same, with the inputs and outputs of the submodules tagged."""

    def with_parameters(self, parameters: Any) -> ModelFunction:
        """Return the same function with other values of its parameters."""


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
        # JAX keeps what it has traced, for as long as it is for the same settings.
        self._jitted = jax.jit(function.tagged)
        self._leaves = function.leaves
        self._leaf_names = function.leaf_names
        self._devices = function.devices
        self.input_shape = input_shape
        self._mesh = jax.sharding.get_mesh()  # sections are made later, where it may not be set
        self._trace = functools.lru_cache(maxsize=16)(self._make_trace)
        small = self._small = self._trace(_SIZE)
        self.output = small.output
        self._kinds = _kinds(small)
        self._traced_batch = traced_batch(function.tagged, self._leaves, input_shape)
        self.cost_per_sample = functools.cache(self._cost_per_sample)
        self.convolution_ranks = convolution_ranks(small.jaxpr)
        self.cells = self._name(small, self._values(small))
        self.hidden = self._hidden_layers(small)
        self._functions: dict[int, JaxFunction] = {}
        self.section = functools.lru_cache(maxsize=None)(self._section)

    def _make_trace(self, batch: int) -> Trace:
        inputs = jax.ShapeDtypeStruct((batch, *self.input_shape), jnp.float32)
        return self._cut(self._traced(self._leaves, inputs))

    def _traced(self, leaves: Sequence[Any], inputs: Any) -> core.ClosedJaxpr:
        with jax.disable_jit(False):  # the user's setting would unroll the loops
            return self._jitted.trace(leaves, inputs).jaxpr

    def is_traced_for(self, shape: Sequence[int]) -> bool:
        """Return whether the model was traced for inputs of a shape, to find its cells."""
        return tuple(shape) == (_SIZE, *self.input_shape)

    def whole(self, leaves: Sequence[Any], inputs: Any) -> Any:
        """Evaluate the model as it was traced, with the tags in it.

        A large model is computed in pieces of two samples. Without tracing it again, its forward
        pass compiles in four fifths of the time.
        """
        closed = self._traced(leaves, inputs)
        return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *leaves, inputs)[0]

    def _cut(self, closed: core.ClosedJaxpr) -> Trace:
        with jax.disable_jit(False):
            inlined = functools.partial(inline, closed)
            flat = jax.make_jaxpr(inlined)(self._leaves, closed.in_avals[-1])
        return Trace(flat, len(self._leaves))

    def _values(self, small: Trace) -> list[tuple[Value, ...]]:
        """Return what is known of the outputs of each slice, from a larger batch.

        The one that costs are read from will do, unless the model treats it in another way.
        """
        if self._traced_batch is not None:
            values = _values_of(small, self._cut(self._traced_batch), PROBE)
            if values is not None:
                return values
        values = _values_of(small, self._make_trace(_OTHER_SIZE), _OTHER_SIZE)
        if values is None:
            raise ValueError(
                "`input_shape`: the model does other things for a batch of "
                f"{_OTHER_SIZE} samples than for one of {_SIZE}, so that there is no one set of "
                "layers. Leave `input_shape` out, and use methods that do not look inside the "
                "model."
            )
        return values

    def _name(self, small: Trace, values: Sequence[tuple[Value, ...]]) -> list[Cell]:
        taken = {part.path for part in small.slices if part.kind == "out"}
        self.input_name = _unique("inputs", taken)
        cells: list[Cell] = []
        for part, outputs in zip(small.slices, values, strict=True):
            inputs = tuple(part.inputs) or (MODEL_INPUT,)
            sources = [self.value(ref, cells) for ref in inputs]
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
        cells = self._share(cells)
        self.shared_names = {
            leaf: _unique(self._leaf_names[leaf].split(".", 1)[1].replace("/", "."), taken)
            for leaf in sorted({leaf for cell in cells for leaf in cell.shared})
        }
        return cells

    def value(self, ref: Ref, cells: Sequence[Cell] = ()) -> Value:
        """Return what is known of the model's input, or of an output of a cell."""
        if ref == MODEL_INPUT:
            return Value(((1, 0), *((0, size) for size in self.input_shape)), "float32")
        return (cells or self.cells)[ref[0]].outputs[ref[1]]

    @staticmethod
    def _layer_name(part: Slice, equations: Sequence[core.JaxprEqn], taken: set[str]) -> str:
        if part.kind == "out":
            return part.path
        if part.kind == "name":
            return _unique(part.path, taken)
        operation = "relu" if part.kind == "relu" else operation_name(equations)
        base = f"{part.path}.{operation}" if part.path else operation
        return _unique(base, taken)

    def is_weight(self, leaf: int) -> bool:
        """Tell what is trained or averaged from counters and the like, which stay as they are."""
        return bool(jnp.issubdtype(self._leaves[leaf].dtype, jnp.inexact))

    def _share(self, cells: list[Cell]) -> list[Cell]:
        """Take the parameters that several layers use out of their cells' own ones."""
        users: dict[int, set[str]] = {}
        for cell in cells:
            for leaf in filter(self.is_weight, cell.leaves):
                users.setdefault(leaf, set()).add(cell.layer)
        return [
            replace(
                cell,
                leaves=tuple(leaf for leaf in cell.leaves if len(users.get(leaf, ())) < 2),
                shared=tuple(leaf for leaf in cell.leaves if len(users.get(leaf, ())) > 1),
            )
            for cell in cells
        ]

    def _hidden_layers(self, trace: Trace) -> dict[str, str]:
        shown = {cell.layer for cell in self.cells}
        hidden = dict.fromkeys(trace.unused(), UNUSED) | trace.hidden
        return {name: why for name, why in hidden.items() if name not in shown}

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

            sources = [self.value(ref) for ref in cell.inputs]
            inputs = [value.has_gradient for value in sources] + [True] * len(cell.shared)
            outputs = [value.has_gradient for value in cell.outputs]
            self._functions[index] = JaxFunction(function, inputs, outputs)
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
        trace, part = self._at(index, batch)
        leaves = own | dict(zip(cell.shared, shared, strict=True))
        values = trace.run(part, leaves, dict(zip(cell.inputs, inputs, strict=True)))
        return tuple(
            value.astype(spec.dtype) for value, spec in zip(values, cell.outputs, strict=True)
        )

    def _cost_per_sample(self, of_pullback: bool) -> Cost | None:
        return cost_per_sample(self._traced_batch, of_pullback)

    def _section(
        self, start: int, stop: int, gradients: tuple[tuple[int, Gradient], ...] = ()
    ) -> Section:
        """Return the cells from one number up to another, as one function.

        The function is the same one at each request.

        Parameters
        ----------
        start, stop
            The numbers.
        gradients
            What the gradients of some of the ReLUs are instead, by their number.
        """
        here = dict.fromkeys(ref for cell in self.cells[start:stop] for ref in cell.inputs)
        inputs = tuple(ref for ref in here if ref[0] < start)
        later = dict.fromkeys(ref for cell in self.cells[stop:] for ref in cell.inputs)
        outputs = tuple(ref for ref in (later | {self.output: None}) if start <= ref[0] < stop)

        changed = dict(gradients)

        def function(leaves: Sequence[Any], *arrays: Any) -> tuple:
            values = dict(zip(inputs, arrays, strict=True))
            for index in range(start, stop):
                cell = self.cells[index]
                own = {leaf: leaves[leaf] for leaf in cell.leaves}
                shared = [leaves[leaf] for leaf in cell.shared]
                tensors = [values[ref] for ref in cell.inputs]
                if index in changed and cell.relu is not None:
                    results: tuple = (relu(tensors[0], cell.relu, changed[index]),)
                else:
                    results = self.run(index, own, shared, tensors)
                values |= {(index, i): result for i, result in enumerate(results)}
            return tuple(values[ref] for ref in outputs)

        read, written = ([self.value(ref) for ref in refs] for refs in (inputs, outputs))
        has_gradient = [[value.has_gradient for value in values] for values in (read, written)]
        outline = self._outline(start, stop, read, written)
        with within(self._mesh):
            batches = self._batches(inputs, outputs)
            jitted = JaxFunction(function, has_gradient[0], has_gradient[1], batches, outline)
        return Section(inputs, outputs, jitted)

    def _batches(self, inputs: tuple[Ref, ...], outputs: tuple[Ref, ...]) -> Batches | None:
        """Return in which sizes to run a section; nothing but for the whole model."""
        if (inputs, outputs) != ((MODEL_INPUT,), (self.output,)):
            return None
        return Batches(lambda _, of_pullback: self.cost_per_sample(of_pullback), self._devices)

    def _outline(
        self, start: int, stop: int, read: Sequence[Value], written: Sequence[Value]
    ) -> Outline | None:
        """Return what is known of a section, if its batch size can be told from its outputs."""
        explained = [value for value in written if value.has_gradient]
        place = _batch_axis(explained)
        if place is None:
            return None
        index, axis, slope = place

        def arrays(cotangents: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
            batch = cotangents[index].shape[axis] // slope
            return [value.outline(batch) for value in read]

        numbers = {i for cell in self.cells[start:stop] for i in (*cell.leaves, *cell.shared)}
        leaves = {i: self._leaves[i] for i in numbers}
        return Outline(leaves, [value.outline(_SIZE) for value in explained], arrays)

    def prefix(self, layer: str, leaves: Sequence[Any], inputs: Any) -> Any:
        """Evaluate the model up to the first call of a layer, with the tags in it."""
        index = self._first_call(layer)
        trace, _ = self._at(index, inputs.shape[0])
        return trace.prefix((index, 0), leaves, inputs)

    def suffix(self, layer: str, leaves: Sequence[Any], value: Any) -> Any:
        """Evaluate the model after the first call of a layer, with the tags in it."""
        index = self._first_call(layer)
        trace, _ = self._at(index, value.shape[0])
        return trace.suffix((index, 0), leaves, value)

    def is_bypassed(self, layer: str) -> bool:
        """Return whether the output depends on more than the first call of a layer."""
        return self._small.is_bypassed((self._first_call(layer), 0))

    def _first_call(self, layer: str) -> int:
        return next(i for i, cell in enumerate(self.cells) if cell.layer == layer)

    def _at(self, index: int, batch: int) -> tuple[Trace, Slice]:
        """Return the trace for a batch size, and one cell's slice of it."""
        trace = self._trace(batch)
        if _kinds(trace) != self._kinds or not set(trace.slices[index].inputs) <= set(
            self.cells[index].inputs
        ):
            raise ValueError(
                f"The model does other things for a batch of {batch} samples than for one of "
                f"{_SIZE}: its layers can't be addressed at this batch size. Use "
                "another `batch_size`, or a method that does not look inside the model."
            )
        return trace, trace.slices[index]


def _kinds(trace: Trace) -> list[tuple[str, str]]:
    return [(part.kind, part.path) for part in trace.slices]


def _values_of(small: Trace, large: Trace, size: int) -> list[tuple[Value, ...]] | None:
    """Return what traces of two sizes tell of the outputs of each slice; none if they differ."""
    if _kinds(small) != _kinds(large):
        return None
    values = []
    for part, other in zip(small.slices, large.slices, strict=True):
        pairs = zip(part.variables, other.variables, strict=True)
        outputs = [_value(a.aval, b.aval, size - _SIZE) for a, b in pairs]
        if None in outputs:
            return None
        values.append(tuple(filter(None, outputs)))
    return values


def _value(small: Any, large: Any, step: int) -> Value | None:
    """Return what is known of a variable; nothing if that is not linear in the batch."""
    if len(small.shape) != len(large.shape):
        return None
    dims = []
    for a, b in zip(small.shape, large.shape, strict=True):
        slope, rest = divmod(b - a, step)
        if rest:
            return None
        dims.append((slope, a - slope * _SIZE))
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
    is_map = len(outputs) == 1 and len(outputs[0].dims) > 2
    return outputs[0].dims[-1][1] if is_map and any(map(is_convolution, equations)) else None


def _unique(base: str, taken: set[str]) -> str:
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name
