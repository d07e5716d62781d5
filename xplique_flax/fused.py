"""A whole model as one function of TensorFlow, mostly computed by one call of JAX per direction."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tensorflow as tf

from .batches import Batches
from .bridge import Bridge, JaxFunction
from .checks import checked_inputs
from .dense import DenseNetwork, dense_network, is_small
from .gpu import devices_of
from .graph import Graph, ModelFunction
from .outputs import checked_output
from .release import CacheEntry
from .samples import Cost, cost_per_sample, traced_batch


class FusedModel:
    """The whole model as one function, and what is known of its inputs and outputs."""

    def __init__(
        self,
        function: ModelFunction,
        graph: Graph | None,
        variables: dict[int, Any],
        cache_entry: CacheEntry,
        compiled: JaxFunction | None = None,
    ) -> None:
        self.function = function
        self.graph = graph
        self.shape = None if graph is None else graph.input_shape
        self.hidden = {} if graph is None else graph.hidden
        self.cache_entry = cache_entry
        self._variables = variables
        self._costs: dict[tuple[tuple[int, ...], bool], Cost | None] = {}
        self.compiled = compiled or JaxFunction(
            self._forward, [True], [True], Batches(self._cost_per_sample, function.devices)
        )
        self._bridge = Bridge(self.compiled, self._leaves_of_call)
        self._output_shapes = functools.lru_cache(maxsize=64)(self._output_shape)
        self._dense_networks = functools.lru_cache(maxsize=64)(self._dense_network)

    def leaves(self) -> list[Any]:
        """Return the current parameters."""
        variables = self._variables
        return [
            variables[i].array if i in variables else leaf
            for i, leaf in enumerate(self.function.leaves)
        ]

    def _leaves_of_call(self) -> list[Any]:
        self.cache_entry.release()
        return self.leaves()

    def _forward(self, leaves: Sequence[Any], inputs: Any) -> tuple:
        if inputs.shape[0] == 0:  # which many modules can't reshape
            return (jnp.zeros((0, *self._shape_for(leaves, inputs.shape[1:]))),)
        if self.graph is not None and self.graph.is_traced_for(inputs.shape):
            return (self.graph.whole(leaves, inputs),)
        return (self.function(leaves, inputs),)

    def _cost_per_sample(self, sample: tuple[int, ...], of_pullback: bool) -> Cost | None:
        if self.graph is not None and sample == self.shape:
            return self.graph.cost_per_sample(of_pullback)
        key = sample, of_pullback
        if key not in self._costs:
            traced = traced_batch(self.function, self.function.leaves, sample)
            self._costs[key] = cost_per_sample(traced, of_pullback)
        return self._costs[key]

    def _dense_network(self, sample: tuple[int, ...]) -> DenseNetwork | None:
        """Return the model as operations of TensorFlow, if JAX would compute it on the CPU too."""
        leaves = self.function.leaves
        places = {device.platform for device in devices_of(leaves)}
        if (
            not is_small(leaves)
            or self.function.devices
            or places != {"cpu"}
            or tf.config.get_visible_devices("GPU")
        ):
            return None
        with self.compiled.mesh():
            trace = functools.partial(traced_batch, self.function, leaves, sample)
            network = dense_network(trace)
        return network if network and set(network.parameters) <= set(self._variables) else None

    def _output_shape(self, sample: tuple[int, ...]) -> tuple[int | None, ...]:
        if self.graph is not None and sample == self.shape:
            return self.graph.value(self.graph.output).shape(None)[1:]
        with self.compiled.mesh():
            return self._shape_for(self.function.leaves, sample)

    def _shape_for(self, leaves: Sequence[Any], sample: tuple[int, ...]) -> tuple[int, ...]:
        inputs = jax.ShapeDtypeStruct((2, *sample), jnp.float32)
        return tuple(jax.eval_shape(self.function, leaves, inputs).shape[1:])

    def output_shape(self, sample: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of one output; it raises what is wrong with the sample's shape."""
        return self._output_shapes(sample)

    def checked(self, inputs: Any) -> tf.Tensor:
        """Return the inputs as a float32 tensor of a shape that the model takes."""
        return checked_inputs(inputs, self.shape)

    def __call__(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return the outputs for a tensor that was checked."""
        sample = self.shape
        if sample is None and tensor.shape[1:].is_fully_defined():
            sample = tuple(tensor.shape[1:])
        shape = None
        if sample is not None:
            shape = [tensor.shape[0], *self.output_shape(sample)]
            if not tf.executing_eagerly() and tensor.shape[1:].is_fully_defined():
                network = self._dense_networks(sample)
                if network is not None:
                    return network({i: v.value for i, v in self._variables.items()}, tensor)
        return self._bridge([tensor], [(shape, tf.float32)])[0]


class _Part:
    """A part of a traced model, as the function of a wrapper."""

    def __init__(self, core: FusedModel, graph: Graph, layer: str, name: str) -> None:
        self._graph = graph
        self._layer = layer
        self._whole = core.function
        self.leaves = core.leaves()
        self.leaf_names = core.function.leaf_names
        self.devices = core.function.devices
        self.name = name

    def with_parameters(self, parameters: Any) -> Any:
        """Return the same part with other parameters of the whole model."""
        other = copy.copy(self)
        other.leaves = self._whole.with_parameters(parameters).leaves
        return other


class Truncated(_Part):
    """A model up to one of its layers."""

    def __call__(self, leaves: Sequence[Any], inputs: Any) -> Any:
        """Return the output of the layer."""
        return checked_output(self._graph.prefix(self._layer, leaves, inputs), inputs)

    tagged = __call__


class Head(_Part):
    """A model after one of its layers."""

    def __call__(self, leaves: Sequence[Any], inputs: Any) -> Any:
        """Return the output of the model, for outputs of the layer."""
        return checked_output(self._graph.suffix(self._layer, leaves, inputs), inputs)

    tagged = __call__
