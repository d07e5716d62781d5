"""TensorFlow's input pipelines, without waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import tensorflow as tf


@contextmanager
def untuned() -> Iterator[None]:
    """Keep pipelines from tuning themselves.

    Xplique takes its batches from pipelines. They are tuned by a thread that sleeps for 10, 20, 40
    milliseconds and so on, and a pipeline that ends often waits for it to wake: for 0.31, 0.63 or
    1.27 seconds in all, whatever tool computes the explanation.
    """
    iterate = tf.data.Dataset.__iter__

    def iterate_untuned(dataset: tf.data.Dataset) -> Any:
        options = tf.data.Options()
        options.autotune.enabled = False
        return iterate(dataset.with_options(options))

    with mock.patch.object(tf.data.Dataset, "__iter__", iterate_untuned):
        yield
