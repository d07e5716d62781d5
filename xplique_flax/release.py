"""Leaving the cache in which Xplique keeps every model that it explained alive for ever."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from types import CodeType
from typing import Any


class CacheEntry:
    """One model's entry in the cache of Xplique's explainers.

    The constructor of an explainer asks for ``model.inputs`` and ``model.outputs``, puts the model
    into the cache under their identities, and reads it back. Each explainer then holds its model
    itself: the entry can go, but not while a constructor, in any thread, is between the two steps.

    Parameters
    ----------
    inputs, outputs
        The objects that the model answers.
    """

    def __init__(self, inputs: Any, outputs: Any) -> None:
        self._key = (id(inputs), id(outputs))
        self._readers: dict[int, int] = {}
        self._reads = 0
        self._lock = threading.Lock()

    def announce(self) -> None:
        """Note that this thread reads the key, and may be about to use it."""
        with self._lock:
            self._reads += 1
            self._readers[threading.get_ident()] = self._reads

    def release(self) -> None:
        """Take the model out of the cache, unless a constructor is at work with it."""
        explainers = sys.modules.get("xplique.attributions.base")
        if explainers is None or self._key not in explainers.BlackBoxExplainer._cache_models:
            return
        readers = dict(self._readers)
        if _is_run_by(readers, explainers.BlackBoxExplainer.__init__.__code__):
            return
        with self._lock:
            if self._readers == readers:  # else a constructor began in the meantime
                self._readers.clear()
                explainers.BlackBoxExplainer._cache_models.pop(self._key, None)


def _is_run_by(threads: Iterable[int], code: CodeType) -> bool:
    frames = sys._current_frames()
    try:
        for thread in threads:
            frame = frames.get(thread)
            while frame is not None:
                if frame.f_code is code:
                    return True
                frame = frame.f_back
        return False
    finally:
        # This function's own frame is among them: left in a cycle, they would keep alive what
        # every thread was working on.
        frames.clear()


def release_all(kind: type[Any]) -> None:
    """Take every model of a class out of the cache."""
    explainers = sys.modules.get("xplique.attributions.base")
    if explainers is not None:
        for model in list(explainers.BlackBoxExplainer._cache_models.values()):
            if isinstance(model, kind):
                model._release()
