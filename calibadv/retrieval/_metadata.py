"""JSON files that this package writes for itself, read with the mistrust that a copied or damaged folder deserves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from calibadv.errors import UserError

Kinds = Mapping[str, type | UnionType]


def read_record(path: Path, kinds: Kinds, remedy: str) -> dict[str, Any]:
    """Read a JSON object that has certain keys."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is missing or damaged ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is damaged (it is no JSON object); {remedy}")
    check_record(path, content, kinds, remedy)
    return content


def check_record(path: Path, content: Mapping[str, Any], kinds: Kinds, remedy: str) -> None:
    """Refuse an object that lacks a key, or has another type under it."""
    for key, kind in kinds.items():
        if key not in content:
            raise UserError(f"'{path}' is damaged (it has no '{key}'); {remedy}")
        if not isinstance(content[key], kind) or (kind is int and content[key] < 1):
            raise UserError(f"'{path}' is damaged (it has {content[key]!r:.60} as '{key}'); {remedy}")
