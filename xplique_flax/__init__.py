"""Explain Flax models with Xplique's attribution methods and metrics."""

from .requirements import check_requirements

check_requirements()

from .wrapper import FlaxWrapper  # noqa: E402

__all__ = ["FlaxWrapper", "__version__"]
__version__ = "0.1.0"
