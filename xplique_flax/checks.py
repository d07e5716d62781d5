"""Bad input, told by messages that name the argument, what was given, and what is accepted."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from flax import nnx
from flax.training.train_state import TrainState

from .devices import Devices
from .graph import UNUSED, Graph, Value

OFF_WHEN_TRUE = ("deterministic", "use_running_average")
MODE_FLAGS = ("train", "training", "is_training", *OFF_WHEN_TRUE)


def check_module(flax_module: Any) -> None:
    """Refuse what is no instance of a Flax module."""
    if isinstance(flax_module, nn.Module | nnx.Module):
        return
    if isinstance(flax_module, type):
        fix = " Make an instance of it."
    elif isinstance(flax_module, Mapping):
        fix = " The parameters are the second argument: FlaxWrapper(flax_module, parameters)."
    elif hasattr(flax_module, "apply_fn"):
        fix = (
            " Pass the module that the training state was made for: "
            "FlaxWrapper.from_train_state(flax_module, state)."
        )
    else:
        fix = (
            " Pass the module itself, not a method of it. Other functions of JAX are wrapped by "
            "FlaxWrapper.from_function(function, parameters)."
        )
    raise TypeError(
        f"`flax_module` is of type {_type_name(flax_module)}. "
        f"Accepted is an instance of flax.linen.Module or flax.nnx.Module.{fix}"
    )


def check_holds_its_own(name: str, given: Any, kind: str, fix: str) -> None:
    """Refuse an argument that this kind of module has no use for."""
    if given is not None:
        raise ValueError(f"`{name}` is {_short(given)}, and {kind}. Leave it out: {fix}.")


def check_eval_mode(eval_mode: Any) -> None:
    """Refuse what is no flag."""
    if not isinstance(eval_mode, bool | None):
        raise TypeError(
            f"`eval_mode` is {_short(eval_mode)}. Accepted are True, which is what NNX modules are "
            "explained in by default, and False, for the mode that they are in."
        )


def check_function(function: Any, parameters: Any) -> None:
    """Refuse what can't be called with inputs, or with parameters and inputs."""
    wanted = (
        "Accepted is a function of JAX: `function(inputs)`, or `function(parameters, inputs)` "
        "where `parameters` are given."
    )
    if isinstance(function, nn.Module | nnx.Module):
        raise TypeError(
            f"`function` is of type {_type_name(function)}, a Flax module. {wanted} Use "
            "FlaxWrapper(flax_module, ...), which knows the layers of Flax modules."
        )
    if not callable(function):
        raise TypeError(f"`function` is of type {_type_name(function)}. {wanted}")
    arguments = [None] if parameters is None else [None, None]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some built-in functions have none
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"`function` is {getattr(function, '__name__', _type_name(function))}{signature}, "
            "which can't be called with "
            f"{'inputs' if parameters is None else 'parameters and inputs'} alone: {error}. "
            f"{wanted} Fix other arguments with a lambda or functools.partial."
        ) from None


def checked_preprocess(preprocess: Any) -> Callable:
    """Return the function that is applied to the inputs first."""
    if preprocess is None:
        return lambda inputs: inputs
    if not callable(preprocess):
        raise TypeError(
            f"`preprocess` is {_short(preprocess)}. Accepted is a function of JAX from a batch of "
            "inputs, in float32, to what the model takes, such as `lambda x: x / 255`."
        )
    return preprocess


def check_same_parameters(
    leaves: Sequence[Any],
    structure: Any,
    known_leaves: Sequence[Any],
    known_structure: Any,
    names: Sequence[str],
) -> None:
    """Refuse parameters that need another compiled model."""
    wanted = (
        "Accepted are parameters of the same structure, shapes and dtypes as those that the model "
        "was wrapped with. Wrap other ones anew, with FlaxWrapper."
    )
    if structure != known_structure:
        raise ValueError(f"`parameters` have another structure. {wanted}")
    for name, leaf, known in zip(names, leaves, known_leaves, strict=True):
        if not is_array(leaf):
            raise TypeError(f"`parameters`: {name} is of type {_type_name(leaf)}. {wanted}")
        if (leaf.shape, leaf.dtype) != (known.shape, known.dtype):
            raise ValueError(
                f"`parameters`: {name} has the shape {leaf.shape} and dtype {leaf.dtype}, and had "
                f"{known.shape} and {known.dtype}. {wanted}"
            )


def check_same_constants(constants: Any, known: Any) -> None:
    """Refuse parameters with other numbers or texts, which the compiled model does not read."""
    for (path, new), old in zip(
        jax.tree.leaves_with_path(constants), jax.tree.leaves(known), strict=True
    ):
        if isinstance(old, bool | int | float | complex | str) and new is not old and new != old:
            name = f"params.{jax.tree_util.keystr(path, simple=True, separator='.')}"
            raise ValueError(
                f"`parameters`: {name} is {new!r}, and was {old!r}. It is no array, and so a "
                "constant of the compiled model. Accepted are parameters with the same constants. "
                "Make an array of it, or wrap other ones anew, with FlaxWrapper."
            )


def check_devices(leaves: Sequence[jax.Array], names: Sequence[str]) -> None:
    """Refuse parameters that one call of a compiled function can't reach together."""
    wanted = (
        "Accepted are parameters on one device, or all sharded over the same devices of this "
        "process. Bring them together: "
    )
    first: tuple[str, set] | None = None
    for name, leaf in zip(names, leaves, strict=True):
        if not leaf.is_fully_addressable:
            raise ValueError(
                f"`parameters`: parts of {name} are on devices of other processes. {wanted}"
                "jax.experimental.multihost_utils.process_allgather(parameters, tiled=True)."
            )
        if leaf.committed:
            devices = leaf.sharding.device_set
            first = first or (name, devices)
            if devices != first[1]:
                raise ValueError(
                    f"`parameters`: {first[0]} is on {_ids(first[1])}, and {name} on "
                    f"{_ids(devices)}. {wanted}jax.device_get(parameters)."
                )


def checked_devices(devices: Any) -> Devices | None:
    """Return the devices to spread batches over."""
    if devices is None:
        return None
    wanted = (
        "Accepted is a list of different devices of this process, all of one kind, such as "
        "jax.local_devices(), or None."
    )
    if not isinstance(devices, list | tuple) or not all(
        isinstance(device, jax.Device) for device in devices
    ):
        raise TypeError(f"`devices` is {devices!r}. {wanted}")
    platforms = {device.platform for device in devices}
    if len(platforms) != 1 or len(set(devices)) < len(devices):
        raise ValueError(f"`devices` is {devices!r}. {wanted}")
    if any(device.process_index != jax.process_index() for device in devices):
        raise ValueError(
            f"`devices` is {devices!r}, of which some belong to other processes. {wanted}"
        )
    if not jax.sharding.get_mesh().empty:
        raise ValueError(
            f"`devices` is {devices!r}, but a mesh is set: {jax.sharding.get_mesh()}. Accepted is "
            "one of them. Wrap the model outside of jax.set_mesh(), or leave `devices` out."
        )
    return Devices(devices)


def _ids(devices: set) -> str:
    ids = ", ".join(str(device.id) for device in sorted(devices, key=lambda device: device.id))
    return f"device{'s' * (len(devices) > 1)} {ids}"


def is_array(value: Any) -> bool:
    """Tell the arrays in a pytree of parameters from everything else."""
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def parameters_of_state(state: Any) -> dict[str, Any]:
    """Return the collections of a training state as what ``init()`` returns."""
    if not hasattr(state, "params"):
        raise TypeError(
            f"`state` is of type {_type_name(state)}, which has no `params`. Accepted is a "
            "flax.training.train_state.TrainState, or one with more collections, such as "
            "`batch_stats`."
        )
    if isinstance(state.params, Mapping) and "params" in state.params:
        return dict(state.params)
    names = [field.name for field in dataclasses.fields(state)]
    known = {field.name for field in dataclasses.fields(TrainState)}
    collections = {name: getattr(state, name) for name in names if name not in known}
    return {
        "params": state.params,
        **{name: value for name, value in collections.items() if isinstance(value, Mapping)},
    }


def check_parameters(parameters: Any) -> None:
    """Refuse what ``init()`` of a module does not return."""
    wanted = (
        "Accepted is the pytree that `flax_module.init()` returns, a dict or FrozenDict with at "
        "least the key 'params'."
    )
    if not isinstance(parameters, Mapping):
        raise TypeError(
            f"`parameters` is of type {_type_name(parameters)}. {wanted} For a TrainState: "
            '`{"params": state.params}`, with `"batch_stats"` if the model has some.'
        )
    if parameters and "params" not in parameters:  # a module without parameters has none
        keys = sorted(map(str, parameters))
        inside = (
            "It looks like the content of 'params': pass `{'params': parameters}`."
            if keys
            and all(
                isinstance(value, Mapping | jax.Array | np.ndarray) for value in parameters.values()
            )
            and not {"batch_stats", "cache", "intermediates"} & set(keys)
            else "Add the collection 'params' to it."
        )
        raise ValueError(f"`parameters` has the keys {keys}. {wanted} {inside}")
    inner = parameters.get("params")
    if isinstance(inner, Mapping) and "params" in inner:
        raise ValueError(
            "`parameters` has 'params' twice, one inside of the other. "
            f"{wanted} Pass `parameters['params']`."
        )
    for path, leaf in jax.tree.flatten_with_path(parameters, is_leaf=lambda leaf: leaf is None)[0]:
        array = is_array(leaf)
        if not array or not _is_numeric(leaf.dtype):
            raise TypeError(
                f"`parameters` has an entry that is no array of numbers: "
                f"{jax.tree_util.keystr(path)} is of type {_type_name(leaf)}"
                f"{f' and dtype {leaf.dtype}' if array else ''}. Accepted are numeric arrays of "
                "JAX or NumPy; `jax.tree.map(np.asarray, parameters)` makes some of tensors."
            )


def _is_numeric(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)


def check_rngs(rngs: Any) -> None:
    """Refuse what is neither a random key nor a dict of some."""
    keys = list(rngs.values()) if isinstance(rngs, Mapping) else [rngs]
    if rngs is not None and not all(map(_is_key, keys)):
        raise TypeError(
            f"`rngs` is {_short(rngs)}. Accepted is a dict from the streams' names to keys, such "
            'as `{"dropout": jax.random.key(0)}`.'
        )


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and (
        jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or value.dtype == jnp.uint32
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:60]}... of type {_type_name(value)}"


def checked_apply_kwargs(apply_kwargs: Any) -> dict[str, Any]:
    """Return the keyword arguments as a dict of their own."""
    if apply_kwargs is None:
        return {}
    if not isinstance(apply_kwargs, Mapping) or not all(isinstance(k, str) for k in apply_kwargs):
        raise TypeError(
            f"`apply_kwargs` is {apply_kwargs!r}. Accepted is a dict of keyword arguments of the "
            'module\'s call, such as `{"train": False}`.'
        )
    reserved = {
        "mutable": "leave it out: state is not updated while explaining",
        "capture_intermediates": "leave it out: get_layer() shows the inside",
        "rngs": "use the argument `rngs` of FlaxWrapper",
        "method": "use the argument `method` of FlaxWrapper",
    }
    for name, fix in reserved.items():
        if name in apply_kwargs:
            raise ValueError(
                f"`apply_kwargs` has {name!r}, which is an argument of Flax's `apply` and not of "
                f"the module's call. Accepted are keyword arguments of the call; {fix}."
            )
    return dict(apply_kwargs)


def checked_method(flax_module: Any, method: Any) -> Callable | None:
    """Return the function that a method or its name stands for."""
    if method is None:
        return None
    found = getattr(type(flax_module), method, None) if isinstance(method, str) else method
    if not callable(found):
        raise ValueError(
            f"`method` is {method!r}, which is no method of {type(flax_module).__name__}. "
            f"Accepted are {_method_names(flax_module)}, or a function of the module and inputs."
        )
    return found


def check_call(function: Callable, flax_module: Any, apply_kwargs: dict[str, Any]) -> None:
    """Refuse keyword arguments that are unknown to the call, or missing from it."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[2:]
    try:
        signature.bind(flax_module, None, **apply_kwargs)
    except TypeError as error:
        names = [p.name for p in parameters]
        missing = [
            p.name for p in parameters if p.default is p.empty and p.name not in apply_kwargs
        ]
        raise ValueError(
            f"`apply_kwargs` is {apply_kwargs}, which does not fit the module's call, "
            f"{function.__qualname__}{signature}: {error}. Accepted are the keyword arguments "
            f"{names}, given for every call{_example(names, missing)}"
        ) from None


def _example(names: list[str], missing: list[str]) -> str:
    flags = [name for name in missing or names if name in MODE_FLAGS]
    if flags:
        value = "True" if flags[0] in OFF_WHEN_TRUE else "False"
        return f', for example `apply_kwargs={{"{flags[0]}": {value}}}`.'
    if missing:
        return (
            f". If {missing[0]!r} is a second array to explain: Xplique's methods take one. Join "
            "the arrays, and take them apart in a function that you pass as `method`."
        )
    return "."


def _method_names(flax_module: Any) -> list[str]:
    module = type(flax_module)
    own = [
        name
        for name, _ in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_")
        and not hasattr(nn.Module, name)
        and not hasattr(nnx.Module, name)
    ]
    return ["__call__", *own]


def _type_name(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} (a class)" if isinstance(value, type) else name


def checked_input_shape(input_shape: Any) -> tuple[int, ...] | None:
    """Return the shape of a sample as a tuple of integers."""
    if input_shape is None:
        return None
    wanted = (
        "Accepted is the shape of one sample, without the batch dimension: a tuple of positive "
        "integers, such as (28, 28, 1) for images, (T, W) for time series, (W,) for tabular data, "
        "or None."
    )
    if isinstance(input_shape, int | np.integer) and not isinstance(input_shape, bool):
        input_shape = (input_shape,)
    if not isinstance(input_shape, tuple | list | tf.TensorShape):
        raise TypeError(
            f"`input_shape` is of type {_type_name(input_shape)}. {wanted} "
            "inputs.shape[1:] gives it."
        )
    sizes = tuple(input_shape)
    if sizes and sizes[0] is None and None not in sizes[1:]:
        raise ValueError(
            f"`input_shape` is {input_shape}, which begins with None, as a batch dimension does. "
            f"{wanted} Pass {sizes[1:]}."
        )
    if not sizes or not all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) and n > 0 for n in sizes
    ):
        raise ValueError(f"`input_shape` is {input_shape}. {wanted} inputs.shape[1:] gives it.")
    return tuple(int(n) for n in sizes)


def checked_inputs(inputs: Any, shape: tuple[int, ...] | None) -> tf.Tensor:
    """Return the inputs as a float32 tensor of a shape that the model takes."""
    try:
        tensor = tf.convert_to_tensor(inputs)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`inputs` is of type {type(inputs).__name__}, which is no array. Accepted are "
            f"one NumPy array or tensor of real numbers, with the batch first. "
            f"TensorFlow says: {' '.join(str(error).split())[:120]}"
        ) from None
    if not (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool):
        raise TypeError(
            f"`inputs` is an array of {tensor.dtype.name}. Accepted are real numbers: "
            "floating point, integer or bool."
        )
    rank = tensor.shape.rank
    if rank == 0:
        raise ValueError(
            "`inputs` has no dimension. Accepted is an array of shape (N, ...), with the "
            "batch first."
        )
    if shape is not None and rank is not None:
        if not tensor.shape[1:].is_compatible_with(shape) or rank != len(shape) + 1:
            raise ValueError(_wrong_shape(tensor.shape, shape))
    return tf.cast(tensor, tf.float32)


def _wrong_shape(given: Any, shape: tuple[int, ...]) -> str:
    text = (
        f"`inputs` has the shape {tuple(given)}, and the wrapper was made for samples of "
        f"`input_shape`={shape}. Accepted are inputs of shape (N, {', '.join(map(str, shape))})."
    )
    sample = tuple(given)[1:]
    if len(sample) == len(shape) > 1 and (*sample[1:], sample[0]) == shape:
        return f"{text} They look channels first: np.moveaxis(inputs, 1, -1) makes them fit."
    if tuple(given) == shape:
        return f"{text} One sample is a batch of one: inputs[None]."
    return f"{text} Resize the inputs, or wrap the model again with another `input_shape`."


def check_not_training(training: Any) -> None:
    """Refuse Keras's training mode, of the model or of a layer."""
    if training is not None and training is not False:
        raise ValueError(
            "`training` is set, and the mode of a wrapped Flax model is fixed: accepted are "
            "False and None. Pass the flag of the module itself when you wrap it, for "
            'example `apply_kwargs={"train": True}`, if you mean to explain that mode.'
        )


def check_layer(layer: Any) -> None:
    """Refuse what is neither the name nor the index of a layer."""
    if not isinstance(layer, str | int):
        raise TypeError(
            f"`layer` is of type {_type_name(layer)}. Accepted is the name or the index of a "
            "layer, such as `wrapped.layers[-1].name` or -1."
        )


def check_has_batch(layer: str, outputs: Sequence[Value]) -> None:
    """Refuse a layer that a model can't end with."""
    if len(outputs) > 1:
        what = f"has {len(outputs)} outputs"
    elif not outputs[0].is_floating:
        what = f"gives {outputs[0].dtype}, which has no gradient"
    elif not outputs[0].dims or outputs[0].dims[0] != (1, 0):
        what = f"gives the shape {outputs[0].shape(None)}, in which the batch is not first or alone"
    else:
        return
    raise ValueError(
        f"`layer` is {layer!r}, which {what}. Accepted are layers with one floating point output "
        "of shape (N, ...): take the next layer of which this is true."
    )


_LOOP = (
    "where one layer stands for many calls and has no single output",
    "write the loop out, with one module per step",
)
_INSIDE = {
    "scan": _LOOP,
    "while": _LOOP,
    "cond": (
        "where it is called for one of the branches alone",
        "compute both branches, and choose with jnp.where",
    ),
}


def why_hidden(where: str) -> str:
    """Say why a module has no layer, and what to do."""
    if where == UNUSED:
        return "a module whose output the explained output does not depend on"
    why, fix = _INSIDE.get(where, ("which JAX treats as one operation", "do without it"))
    return f"a module inside a `{where}`, {why}: take the layer that has it inside, or {fix}"


def check_not_bypassed(layer: str, graph: Graph) -> None:
    """Refuse a layer that does not cut the model in two."""
    if graph.is_bypassed(layer):
        raise ValueError(
            f"`layer` is {layer!r}, and the rest of the model depends on the inputs by another way "
            "too, such as a skip connection. Accepted are layers that everything goes through: "
            "take a later one, such as the sum at the end of the block."
        )


def no_such_layer(name: Any, names: list[str], hidden: dict[str, str]) -> str:
    """Say why a layer is not there, and which ones are."""
    if name in hidden:
        return f"`layer` is {name!r}, {why_hidden(hidden[name])}. Accepted are {names}."
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"`layer` is {name!r}, and the model has no layer of this name.{meant} It has {names}."


def refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise the error for what asks for variables or functions that TensorFlow could save."""
    raise NotImplementedError(
        "A wrapped Flax model and its sub-models can't be saved, checkpointed or exported: "
        "TensorFlow would leave the Flax parameters out without a word. Save the parameters of "
        "the Flax module, for example with Orbax or flax.serialization, or export the module "
        "itself, for example with jax.export."
    )
