"""JSON metadata files that this package writes for itself, validated when they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from calibadv.errors import UserError

KeyTypes = Mapping[str, type | UnionType]
"""The type of the value under each required key; integers must be at least 1."""


def read_metadata(path: Path, types: KeyTypes, remedy: str) -> dict[str, Any]:
    """Read a JSON object, and check its keys with ``check_metadata``."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is missing or damaged ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is damaged (it is no JSON object); {remedy}")
    check_metadata(path, content, types, remedy)
    return content


def check_metadata(path: Path, content: Mapping[str, Any], types: KeyTypes, remedy: str) -> None:
    """Refuse an object that lacks a required key or holds a value of another type."""
    for key, kind in types.items():
        if key not in content:
            raise UserError(f"'{path}' is damaged (it has no '{key}'); {remedy}")
        if not isinstance(content[key], kind) or (kind is int and content[key] < 1):
            raise UserError(f"'{path}' is damaged (it has {content[key]!r:.60} as '{key}'); {remedy}")
