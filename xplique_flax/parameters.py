"""A parameter that Keras and JAX both see."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import tensorflow as tf


class Parameter(keras.Variable):
    """A Keras variable whose value is at hand as a JAX array, without a copy at each call.

    Parameters
    ----------
    value
        The array, of JAX or NumPy.
    leaf_name
        Its path in the pytree, such as ``params.Conv_0.kernel``: the first part is the
        collection, of which ``params`` is the one that is trained; the last names the variable.
    """

    def __init__(self, value: Any, leaf_name: str) -> None:
        collection, *_, name = leaf_name.split(".")
        array = jnp.asarray(value)
        super().__init__(
            np.asarray(array),
            dtype=str(array.dtype),
            trainable=collection == "params",
            name=name.replace("/", "."),
        )
        self.array: jax.Array = array

    def assign(self, value: Any) -> Any:
        """Set the value, for Keras and JAX alike."""
        if not tf.executing_eagerly():
            raise NotImplementedError(
                "The parameters of a wrapped Flax model can be set eagerly alone, and this is "
                "inside of a tf.function. Call set_weights() or assign() outside of it."
            )
        result = super().assign(value)
        self.array = jnp.asarray(self.numpy())
        return result


def current_values(sources: dict[int, Any]) -> dict[int, Any]:
    """Return the arrays of what are parameters, and the rest as it is."""
    return {
        leaf: source.array if isinstance(source, Parameter) else source
        for leaf, source in sources.items()
    }
