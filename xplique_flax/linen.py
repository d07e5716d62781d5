"""Linen modules as pure functions of their parameters and inputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .graph import tag

Output = str | int | Callable[[Any], Any]


class LinenFunction:
    """A Linen module with everything but its parameters and inputs fixed.

    The arguments are those of :class:`xplique_flax.FlaxWrapper`, and are checked here.

    Attributes
    ----------
    leaves : list of array
        The parameters, as a flat list.
    leaf_names : list of str
        Where each of them is in the pytree, such as ``params.Conv_0.kernel``.
    """

    def __init__(
        self,
        flax_module: nn.Module,
        parameters: Any,
        apply_kwargs: Mapping[str, Any] | None,
        method: str | Callable | None,
        rngs: Any,
        output: Output | None,
    ) -> None:
        _check_module(flax_module)
        _check_parameters(parameters)
        self._module = flax_module
        self._apply_kwargs = _checked_apply_kwargs(apply_kwargs)
        self._method = _checked_method(flax_module, method)
        self._rngs = rngs
        self._select = _Select(output)
        _check_call(self._method or type(flax_module).__call__, flax_module, self._apply_kwargs)

        paths, self._structure = jax.tree.flatten_with_path(parameters)
        self.leaves = [jnp.asarray(leaf) for _, leaf in paths]
        self.leaf_names = [".".join(_key(entry) for entry in path) for path, _ in paths]
        self.name = type(flax_module).__name__

    def __call__(self, leaves: Sequence[Any], inputs: Any) -> Any:
        """Return the explained output, in float32, for a batch of inputs."""
        try:
            result = self._apply(leaves, inputs)
        except Exception as error:
            raise ValueError(self._explain(error, inputs)) from error
        return checked_output(self._select(result), inputs)

    def _apply(self, leaves: Sequence[Any], inputs: Any) -> Any:
        return self._module.apply(
            jax.tree.unflatten(self._structure, leaves),
            inputs,
            rngs=self._rngs,
            method=self._method,
            **self._apply_kwargs,
        )

    def tagged(self, leaves: Sequence[Any], inputs: Any) -> Any:
        """Do the same, with the inputs and outputs of the submodules tagged."""
        with nn.intercept_methods(_tag_submodules):
            return self(leaves, inputs)

    def _explain(self, error: Exception, inputs: Any) -> str:
        reason = f"{type(error).__name__}: {error}"
        sample = tuple(inputs.shape[1:])
        if isinstance(error, flax.errors.InvalidRngError):
            return (
                "`rngs`: the module asks for a random stream that was not given. Switch the "
                'randomness off, for example with `apply_kwargs={"deterministic": True}` or '
                '`{"train": False}`, whichever flag the module has, or pass the stream, for '
                f'example `rngs={{"dropout": jax.random.key(0)}}`. Flax says: {reason}'
            )
        if isinstance(error, flax.errors.ModifyScopeVariableError):
            return (
                "`apply_kwargs`: the call updates the module's state, as a module in training "
                "mode does; an explained model is a function of its inputs alone. Pass the flag "
                'that sets evaluation mode, for example `apply_kwargs={"train": False}`'
                f"{_flags(self._module, self._method)}. Flax says: {reason}"
            )
        if isinstance(
            error, flax.errors.ScopeParamNotFoundError | flax.errors.ScopeCollectionNotFound
        ):
            return (
                "`parameters` do not fit `flax_module`: something that the module reads is "
                "missing from them. Pass the whole pytree that `flax_module.init()` returned, "
                f"for this module. Flax says: {reason}"
            )
        text = (
            f"`inputs`: the module can't be applied, with these `parameters`, to samples of shape "
            f"{sample} (float32). Accepted are inputs of the shape that the parameters were made "
            f"for, with the batch first. {reason}"
        )
        if re.search("must (be|have) (an )?integer", str(error)):
            text += (
                " Inputs are computed on in float32, as Xplique gives them: a module that looks "
                "up integers has to cast them itself (`inputs.astype(int)`)."
            )
        moved = (*sample[1:], sample[0]) if len(sample) > 1 else sample
        if moved != sample and self.accepts(moved):
            text += (
                f" They look channels first: samples of shape {moved} do fit. Flax and Xplique "
                "want channels last, (N, H, W, C): np.moveaxis(inputs, 1, -1)."
            )
        elif len(sample) > 1 and self.accepts(sample[1:]):
            text += (
                f" Samples of shape {sample[1:]} do fit: does the shape include the batch "
                "dimension? `input_shape` is the shape of one sample, without it."
            )
        return text

    def accepts(self, sample: tuple[int, ...]) -> bool:
        """Return whether the module can be applied to samples of a shape."""
        leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self.leaves]
        inputs = jax.ShapeDtypeStruct((2, *sample), jnp.float32)
        try:
            jax.eval_shape(self._apply, leaves, inputs)
        except Exception:
            return False
        return True


class _Select:
    """Take the explained array out of what a module returns."""

    def __init__(self, output: Output | None) -> None:
        if not (output is None or isinstance(output, str | int) or callable(output)):
            raise TypeError(
                f"`output` is {output!r}, of type {type(output).__name__}. Accepted are a key or "
                'an index of the structured output, such as "logits" or 0, or a function, such as '
                '`lambda out: out["logits"]`.'
            )
        self._output = output

    def __call__(self, result: Any) -> Any:
        output = self._output
        if output is None:
            return result
        if callable(output):
            return output(result)
        if isinstance(result, Mapping) and output in result:
            return result[output]
        if isinstance(output, int) and isinstance(result, tuple | list):
            if -len(result) <= output < len(result):
                return result[output]
        if isinstance(output, str) and not isinstance(result, jax.Array):
            if hasattr(result, output):
                return getattr(result, output)
        raise ValueError(
            f"`output` is {output!r}, and the module returns {describe(result)}. "
            "Accepted are one of its keys or indices, or a function of it that returns one array."
        )


def checked_output(result: Any, inputs: Any) -> Any:
    """Return the explained output in float32, or say why it can't be explained."""
    if not isinstance(result, jax.Array):
        raise ValueError(
            f"`output`: the module returns {describe(result)}, and one array has to be explained. "
            'Say which: a key or an index of it, such as "logits" or 0, or a function, such as '
            '`lambda out: out["logits"]`.'
        )
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise ValueError(
            f"`output`: the module returns an array of {result.dtype}, and floating point numbers "
            "are accepted, since others have no gradient. Pass an `output` function that returns "
            "some, such as the logits or `lambda out: jnp.abs(out)`."
        )
    if result.ndim == 0 or result.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"`output`: for {inputs.shape[0]} samples the module returns an array of shape "
            f"{result.shape}, without a batch dimension. Accepted is one output a sample, with "
            "the batch first. Pass a `method` or an `output` function that keeps the batch."
        )
    return result.astype(jnp.float32)


def describe(result: Any) -> str:
    """Describe a structured output in a message."""
    if isinstance(result, jax.Array):
        return f"one array of shape {result.shape}"
    if isinstance(result, Mapping):
        return f"a dict with the keys {sorted(map(str, result))}"
    if isinstance(result, tuple | list):
        return f"a {type(result).__name__} of {len(result)}"
    return f"a {type(result).__name__}"


def _tag_submodules(
    call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
) -> Any:
    path = ".".join(context.module.path).replace("/", ".")
    if not path or context.method_name == "setup":
        return call(*args, **kwargs)
    args, kwargs = tag((args, kwargs), "in", path)
    return tag(call(*args, **kwargs), "out", path)


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _check_module(flax_module: Any) -> None:
    if not isinstance(flax_module, nn.Module):
        made = " Make an instance of it." if isinstance(flax_module, type) else ""
        raise TypeError(
            f"`flax_module` is of type {_type_name(flax_module)}. "
            f"Accepted is an instance of flax.linen.Module.{made}"
        )


def _check_parameters(parameters: Any) -> None:
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
    for path, leaf in jax.tree.flatten_with_path(parameters)[0]:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or isinstance(
            leaf, jax.ShapeDtypeStruct
        ):
            raise TypeError(
                f"`parameters` has an entry that is no array: {jax.tree_util.keystr(path)} is of "
                f"type {_type_name(leaf)}. Accepted are arrays of JAX or NumPy; "
                "`jax.tree.map(jnp.asarray, parameters)` makes some of lists of numbers."
            )


def _checked_apply_kwargs(apply_kwargs: Any) -> dict[str, Any]:
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


def _checked_method(flax_module: nn.Module, method: Any) -> Callable | None:
    if method is None:
        return None
    found = getattr(type(flax_module), method, None) if isinstance(method, str) else method
    if not callable(found):
        raise ValueError(
            f"`method` is {method!r}, which is no method of {type(flax_module).__name__}. "
            f"Accepted are {_method_names(flax_module)}, or a function of the module and inputs."
        )
    return found


def _check_call(function: Callable, flax_module: nn.Module, apply_kwargs: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    parameters = list(signature.parameters.values())[2:]
    try:
        signature.bind(flax_module, None, **apply_kwargs)
    except TypeError as error:
        names = [p.name for p in parameters]
        raise ValueError(
            f"`apply_kwargs` is {apply_kwargs}, which does not fit the module's call, "
            f"{function.__qualname__}{signature}: {error}. Accepted are the keyword arguments "
            f"{names}, given for every call, for example `apply_kwargs={{{_example(names)}}}`."
        ) from None


def _example(names: list[str]) -> str:
    return f'"{names[0]}": {"True" if names[0] == "deterministic" else "False"}' if names else ""


def _method_names(flax_module: nn.Module) -> list[str]:
    module = type(flax_module)
    own = [
        name
        for name, _ in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and not hasattr(nn.Module, name)
    ]
    return ["__call__", *own]


def _flags(flax_module: nn.Module, method: Callable | None) -> str:
    function = method or type(flax_module).__call__
    known = ("train", "training", "is_training", "deterministic", "use_running_average")
    names = [name for name in inspect.signature(function).parameters if name in known]
    return f" (the call has the flag {names[0]!r})" if names else ""


def _type_name(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} (a class)" if isinstance(value, type) else name
