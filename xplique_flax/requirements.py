"""What has to be installed and set before anything else is imported."""

from __future__ import annotations

import os
import re
from importlib import metadata

MINIMUM_VERSIONS = {"jax": (0, 10), "flax": (0, 12, 2)}


def check_requirements() -> None:
    """Raise an ``ImportError`` that names what is missing, too old or set otherwise.

    Raises
    ------
    ImportError
        If JAX or Flax is missing or too old, if Keras's backend is not TensorFlow, or if
        ``tf.keras`` is set to be Keras 2.
    """
    for package, minimum in MINIMUM_VERSIONS.items():
        wanted = f"{package} {'.'.join(map(str, minimum))} or later"
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise ImportError(
                f"xplique_flax needs {wanted}, and {package} is not installed. "
                f"Install it: pip install --upgrade {package}"
            ) from None
        if tuple(map(int, re.findall(r"\d+", version))) < minimum:
            raise ImportError(
                f"xplique_flax needs {wanted}, and {package} {version} is installed. "
                f"Upgrade it: pip install --upgrade {package}"
            )

    if os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
        raise ImportError(
            "xplique_flax needs Keras 3, and the environment variable TF_USE_LEGACY_KERAS="
            f"{os.environ['TF_USE_LEGACY_KERAS']} makes tf.keras Keras 2. "
            "Unset it before TensorFlow is imported."
        )

    backend = os.environ.get("KERAS_BACKEND")
    if not backend:
        import keras

        backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ImportError(
            "xplique_flax needs Keras's backend to be TensorFlow, which Xplique is written for, "
            f"and it is '{backend}'. Set the environment variable KERAS_BACKEND=tensorflow, or "
            "unset it, before Keras is imported."
        )
