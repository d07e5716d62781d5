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

from .checks import (
    MODE_FLAGS,
    check_call,
    check_module,
    check_parameters,
    check_rngs,
    checked_apply_kwargs,
    checked_method,
)
from .jaxprs import tag
from .outputs import Output, Select, checked_output

_VALUE_DEPENDENT = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)


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
        check_module(flax_module)
        check_parameters(parameters)
        self._module = flax_module
        self._apply_kwargs = checked_apply_kwargs(apply_kwargs)
        self._method = checked_method(flax_module, method)
        check_rngs(rngs)
        self._rngs = rngs
        self._select = Select(output)
        check_call(self._method or type(flax_module).__call__, flax_module, self._apply_kwargs)

        paths, self._structure = jax.tree.flatten_with_path(parameters)
        # Copies: a training step that donates its arguments takes the originals' memory away.
        self.leaves = [jnp.array(leaf) for _, leaf in paths]
        self.leaf_names = [
            jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths
        ]
        # TensorFlow admits few names for what becomes a scope of its graphs.
        self.name = re.sub(r"[^A-Za-z0-9.]", "_", type(flax_module).__name__).lstrip("_") or "model"

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
        with nn.intercept_methods(_tagging()):
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
        if "must be passed to the constructor or at call time" in str(error):
            return (
                "`apply_kwargs`: a flag that sets the mode is missing. Pass it, for example "
                f'`apply_kwargs={{"deterministic": True}}`'
                f"{_flags(self._module, self._method)}, or give it to the modules that need it. "
                f"Flax says: {reason}"
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
            f"`flax_module` can't be applied to `inputs` of shape {tuple(inputs.shape)}. {reason}"
        )
        if isinstance(error, flax.errors.ScopeParamShapeError):
            text = (
                f"`inputs` or `parameters`: these parameters were made for inputs of another shape "
                f"than (N, {', '.join(map(str, sample))}), or for another module. Accepted are "
                f"inputs of the shape that they were made for, with the batch first. {reason}"
            )
        elif isinstance(
            error, jax.errors.ConcretizationTypeError | jax.errors.TracerArrayConversionError
        ):
            text += (
                " The module is compiled: what it does can depend on the shapes of its inputs, "
                "not on their values. Use jnp.where or jax.lax.cond, and jnp in place of np."
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


def _tagging() -> Callable:
    active: list[str] = []

    def tag_submodules(
        call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        path = ".".join(context.module.path).replace("/", ".")
        # A module's own methods, and modules that share its scope, are part of its call.
        if not path or path in active or context.method_name == "setup":
            return call(*args, **kwargs)
        active.append(path)
        try:
            args, kwargs = tag((args, kwargs), "in", path)
            return tag(call(*args, **kwargs), "out", path)
        finally:
            active.remove(path)

    return tag_submodules


def _flags(flax_module: nn.Module, method: Callable | None) -> str:
    function = method or type(flax_module).__call__
    names = [name for name in inspect.signature(function).parameters if name in MODE_FLAGS]
    return f" (the call has the flag {names[0]!r})" if names else ""
