"""NNX modules as functions of their parameters and inputs."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx

from .checks import check_call, checked_apply_kwargs, checked_method
from .function import WrappedFunction
from .jaxprs import tag
from .linen import tag_linen_modules
from .outputs import Output

_active: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("active", default=None)
"""The paths of the modules that are being called, while they tag what goes in and out."""


class NNXFunction(WrappedFunction):
    """An NNX module; the arguments are those of :class:`xplique_flax.FlaxWrapper`.

    The module is taken apart once. Each trace puts a module of its own together, so that nothing
    is changed in the user's one, nor by a call that updates its state.
    """

    def __init__(
        self,
        flax_module: nnx.Module,
        apply_kwargs: Mapping[str, Any] | None,
        method: str | Callable | None,
        eval_mode: bool,
        output: Output | None,
        preprocess: Callable | None,
    ) -> None:
        self._apply_kwargs = checked_apply_kwargs(apply_kwargs)
        self._method = checked_method(flax_module, method)
        check_call(self._method or type(flax_module).__call__, flax_module, self._apply_kwargs)
        view = nnx.merge(*nnx.split(flax_module))
        if eval_mode:
            view.eval()
        self._definition, state = nnx.split(view)
        super().__init__(type(flax_module).__name__, state, output, preprocess)
        collections = {
            ".".join(map(str, path)): _collection(type(variable))
            for path, variable in nnx.to_flat_state(state)
        }
        self.leaf_names = [f"{collections.get(name, 'state')}.{name}" for name in self.leaf_names]
        self._tagged_types: dict[tuple[type, str], type] = {}

    def apply(self, parameters: Any, inputs: Any) -> Any:
        """Call a module that is put together for this call alone."""
        module = nnx.merge(self._definition, parameters)
        if _active.get() is not None:
            self._tag_submodules(module)
        call = self._method or type(module).__call__
        return call(module, inputs, **self._apply_kwargs)

    def arrays_of(self, parameters: Any) -> Any:
        """Return the state of a module, or the state itself."""
        return nnx.state(parameters) if isinstance(parameters, nnx.Module) else parameters

    @contextlib.contextmanager
    def tagging(self) -> Iterator[None]:
        """Return a context in which modules tag what goes in and out, Linen modules inside too."""
        active: list[str] = []
        token = _active.set(active)
        try:
            with tag_linen_modules(lambda: active[-1] if active else ""):
                yield
        finally:
            _active.reset(token)

    def _tag_submodules(self, module: nnx.Module) -> None:
        for path, submodule in nnx.iter_modules(module):
            kind = type(submodule)
            if path and callable(submodule):
                name = ".".join(map(str, path))
                if (kind, name) not in self._tagged_types:
                    self._tagged_types[kind, name] = _tagged_type(kind, name)
                object.__setattr__(submodule, "__class__", self._tagged_types[kind, name])


def _tagged_type(kind: type, path: str) -> type:
    """Return a class whose methods tag what goes in and out, while the context asks for it."""

    def tagged(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            active = _active.get()
            # A module's own methods are part of its call.
            if active is None or path in active:
                return method(module, *args, **kwargs)
            active.append(path)
            try:
                args, kwargs = tag((args, kwargs), "in", path)
                return tag(method(module, *args, **kwargs), "out", path)
            finally:
                active.remove(path)

        return call

    methods = {
        name: tagged(method)
        for name, method in inspect.getmembers(kind, _is_method)
        if name == "__call__" or not (name.startswith("_") or hasattr(nnx.Module, name))
    }
    return type(kind.__name__, (kind,), methods)


def _is_method(member: Any) -> bool:
    # Transforms, such as nnx.jit, make other callables of functions.
    return inspect.isfunction(member) or (callable(member) and hasattr(member, "__wrapped__"))


def _collection(kind: type) -> str:
    return "params" if issubclass(kind, nnx.Param) else kind.__name__
