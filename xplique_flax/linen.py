"""Linen modules as functions of their parameters and inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import flax.linen as nn

from .checks import (
    MODE_FLAGS,
    check_call,
    check_parameters,
    check_rngs,
    checked_apply_kwargs,
    checked_method,
)
from .function import WrappedFunction
from .jaxprs import tag
from .outputs import Output


class LinenFunction(WrappedFunction):
    """A Linen module; the arguments are those of :class:`xplique_flax.FlaxWrapper`."""

    def __init__(
        self,
        flax_module: nn.Module,
        parameters: Any,
        apply_kwargs: Mapping[str, Any] | None,
        method: str | Callable | None,
        rngs: Any,
        output: Output | None,
        preprocess: Callable | None,
    ) -> None:
        check_parameters(parameters)
        self._module = flax_module
        self._apply_kwargs = checked_apply_kwargs(apply_kwargs)
        self._method = checked_method(flax_module, method)
        check_rngs(rngs)
        self._rngs = rngs
        check_call(self._method or type(flax_module).__call__, flax_module, self._apply_kwargs)
        super().__init__(type(flax_module).__name__, parameters, output, preprocess)

    def apply(self, parameters: Any, inputs: Any) -> Any:
        """Call Flax's ``apply``."""
        return self._module.apply(
            parameters, inputs, rngs=self._rngs, method=self._method, **self._apply_kwargs
        )

    def tagging(self) -> Any:
        """Return a context in which Flax tells of each call of a module."""
        return tag_linen_modules(lambda: "")

    def explain_framework(self, error: Exception, inputs: Any, reason: str) -> str:
        """Say what an error of Flax means for the arguments of the wrapper."""
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
        if isinstance(error, flax.errors.ScopeParamShapeError):
            sample = ", ".join(map(str, inputs.shape[1:]))
            return self._explain_shapes(
                f"`inputs` or `parameters`: these parameters were made for inputs of another shape "
                f"than (N, {sample}), or for another module. Accepted are inputs of the shape that "
                f"they were made for, with the batch first. {reason}",
                error,
                inputs,
            )
        return ""


def tag_linen_modules(prefix: Callable[[], str]) -> Any:
    """Return a context in which Linen modules tag the inputs and outputs of their calls.

    Parameters
    ----------
    prefix
        Returns the path of the module of another kind that is being called, if there is one.
    """
    active: list[str] = []

    def tag_submodules(
        call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        path = ".".join(context.module.path).replace("/", ".")
        # A module's own methods, and modules that share its scope, are part of its call.
        if not path or path in active or context.method_name == "setup":
            return call(*args, **kwargs)
        active.append(path)
        name = f"{prefix()}.{path}".lstrip(".")
        try:
            args, kwargs = tag((args, kwargs), "in", name)
            return tag(call(*args, **kwargs), "out", name)
        finally:
            active.remove(path)

    return nn.intercept_methods(tag_submodules)


def _flags(flax_module: nn.Module, method: Callable | None) -> str:
    function = method or type(flax_module).__call__
    names = [name for name in inspect.signature(function).parameters if name in MODE_FLAGS]
    return f" (the call has the flag {names[0]!r})" if names else ""
