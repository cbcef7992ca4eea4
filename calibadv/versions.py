"""With which versions results are made."""

from __future__ import annotations

import platform
from importlib.metadata import version

_PACKAGES = ("calibadv", "torch", "transformers", "lightning")


def versions() -> dict[str, str]:
    """What results depend on.

    Returns:
        Version by name, of Python and of the packages.
    """
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
