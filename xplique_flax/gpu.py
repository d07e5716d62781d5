"""Passing arrays between TensorFlow and JAX on the GPU, without a copy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf

_KIND = "GPU"


def is_shared() -> bool:
    """Return whether TensorFlow and JAX both compute on the GPU."""
    return jax.default_backend() == _KIND.lower() and bool(tf.config.get_visible_devices(_KIND))


def devices_of(parameters: Any) -> set[jax.Device]:
    """Return all devices that parameters are on."""
    arrays = (leaf for leaf in jax.tree.leaves(parameters) if isinstance(leaf, jax.Array))
    return set().union(*(array.devices() for array in arrays))


def to_jax(tensor: tf.Tensor, devices: set[jax.Device]) -> Any:
    """Return a tensor as an array of JAX in the same memory, if it can be used on these devices.

    It is an array of NumPy if it is on the host, or if not all of the devices are its own: JAX then
    moves it.
    """
    if _KIND in tensor.device:
        array = jnp.from_dlpack(tensor)  # which waits for TensorFlow to have computed it
        if devices <= array.devices():
            return array
    return np.asarray(tensor)


def to_tensorflow(array: Any) -> tf.Tensor:
    """Return an array as a tensor: in the same memory, if it is that of one device."""
    if not isinstance(array, jax.Array) or len(array.devices()) > 1:
        return tf.convert_to_tensor(np.asarray(array))
    return tf.experimental.dlpack.from_dlpack(jax.block_until_ready(array).__dlpack__())


def is_gradient_asked() -> bool:
    """Return whether a gradient tape may be recording."""
    try:
        from tensorflow.python.eager import record
    except ImportError:  # it is no public module
        return True
    return bool(record.could_possibly_record())
