"""What of a model's output is explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Output = str | int | Callable[[Any], Any]


class Select:
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
        """Return the array that was asked for."""
        output = self._output
        if output is None:
            return result
        if callable(output):
            return self._call(output, result)
        if isinstance(result, jax.Array):
            raise ValueError(
                f"`output` is {output!r}, and the module returns {describe(result)}, which has no "
                "keys and is explained as it is. Leave `output` out."
            )
        if isinstance(result, Mapping) and output in result:
            return result[output]
        if isinstance(output, int) and isinstance(result, tuple | list):
            if -len(result) <= output < len(result):
                return result[output]
        if isinstance(output, str) and hasattr(result, output):
            return getattr(result, output)
        raise ValueError(
            f"`output` is {output!r}, and the module returns {describe(result)}. "
            "Accepted are one of its keys or indices, or a function of it that returns one array."
        )

    @staticmethod
    def _call(output: Callable[[Any], Any], result: Any) -> Any:
        try:
            return output(result)
        except Exception as error:
            raise ValueError(
                f"`output` is a function that failed with {type(error).__name__}: {error}. "
                f"The module returns {describe(result)}. Accepted is a function of that, which "
                'returns one array, such as `lambda out: out["logits"]`.'
            ) from error


def checked_output(result: Any, inputs: Any) -> Any:
    """Return the explained output in float32, or say why it can't be explained."""
    if not isinstance(result, jax.Array):
        raise ValueError(
            f"`output`: what is selected is {describe(result)}, and one array has to be explained. "
            'Say which: a key or an index of it, such as "logits" or 0, or a function, such as '
            '`lambda out: out["logits"]`.'
        )
    if not jnp.issubdtype(result.dtype, jnp.floating):
        is_complex = jnp.issubdtype(result.dtype, jnp.complexfloating)
        example = "`lambda out: jnp.abs(out)`" if is_complex else "the logits of a predicted class"
        raise ValueError(
            f"`output`: the module returns an array of {result.dtype}, and floating point numbers "
            "are accepted, since others have no gradient. Pass a `method` or an `output` function "
            f"that returns some, such as {example}."
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
