"""With which versions, and on which machine, results are made."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("calibadv", "torch", "transformers", "lightning")


def versions() -> dict[str, str]:
    """What results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def machine() -> dict[str, str | int | None]:
    """What times depend on, and roundings sometimes."""
    return {"processor": _processor(), "cores": os.cpu_count(), "platform": platform.platform()}


def _processor() -> str:
    """The processor's name; Python knows it on some systems only."""
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
