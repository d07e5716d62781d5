"""Models on several devices: eight virtual ones, which JAX has to be told of before it starts."""

import os
import subprocess
import sys
from pathlib import Path


def test_on_eight_devices():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/eight_devices.py"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
