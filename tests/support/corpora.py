"""Corpus files for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORDS = [
    {"id": 1, "title": "Prague", "text": "The city lies on a river."},
    {"id": "two", "title": "Otter", "text": "An animal that swims and eats fish."},
    {"id": 3, "contents": '"Opera"\nA play in which everything is sung.'},
]


def write_lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)
