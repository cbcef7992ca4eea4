"""The command ``calibadv world export``: a synthetic world as files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibadv.io.files import check_empty
from calibadv.world.world import build_world


def export(out: Path, seed: int = 0) -> None:
    """Write a synthetic world as files: corpus.jsonl, train.jsonl, validation.jsonl and test.jsonl.

    Args:
        out: Folder to write; it must be empty or not there.
        seed: Of the world. 0 is the world that configs call 'embedded'.

    Raises:
        UserError: the folder holds something.
    """
    check_empty(out)
    world = build_world(seed)
    out.mkdir(parents=True, exist_ok=True)
    corpus = ({"id": d.id, "contents": f'"{d.title}"\n{d.text}'} for d in world.documents)
    _write_lines(out / "corpus.jsonl", corpus)
    for split, questions in world.questions.items():
        _write_lines(out / f"{split}.jsonl", (asdict(question) for question in questions))


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
