"""What a contributor's machine may lack, and CI may not."""

from __future__ import annotations

import os

import pytest


def missing(tool: str) -> None:
    """Skip the test, or fail it where nothing may be missing."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{tool} was not found")
