"""With JAX's compilation cache on, a second process finds all that it needs."""

import os
import subprocess
import sys

SCRIPT = """
import jax

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))

from xplique.attributions import GuidedBackprop, Occlusion, Saliency

from tests.architectures import digits
from tests.test_batches import PARAMETERS, Net
from xplique_flax import FlaxWrapper

inputs, targets = digits(11)
wrapped = FlaxWrapper(Net(), PARAMETERS, input_shape=inputs.shape[1:])
del events[:]
Saliency(wrapped, batch_size=8)(inputs, targets)
Occlusion(wrapped, patch_size=2, patch_stride=2, batch_size=8)(inputs, targets)
GuidedBackprop(wrapped, batch_size=8)(inputs, targets)
for name in ("cache_misses", "cache_hits"):
    print(events.count(f"/jax/compilation_cache/{name}"))
"""


def test_second_process_compiles_nothing(tmp_path):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def run():
        command = [sys.executable, "-c", SCRIPT]
        printed = subprocess.run(
            command, env=os.environ | cache, check=True, capture_output=True, text=True
        ).stdout
        misses, hits = map(int, printed.split()[-2:])
        return misses, hits

    first_misses, _ = run()
    misses, hits = run()
    assert first_misses > 0
    assert misses == 0
    assert hits >= first_misses
