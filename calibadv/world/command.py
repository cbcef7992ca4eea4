"""The commands of ``calibadv world``: export the embedded world's files, or train the tiny policy from scratch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibadv.errors import UserError
from calibadv.world.world import build_world


def export(out: Path, seed: int = 0) -> None:
    """Write a synthetic world as files: corpus.jsonl, train.jsonl, validation.jsonl and test.jsonl."""
    _check_empty(out)
    world = build_world(seed)
    out.mkdir(parents=True, exist_ok=True)
    corpus = ({"id": d.id, "contents": f'"{d.title}"\n{d.text}'} for d in world.documents)
    _write_lines(out / "corpus.jsonl", corpus)
    for split, questions in world.questions.items():
        _write_lines(out / f"{split}.jsonl", (asdict(question) for question in questions))


def policy(out: Path, seed: int = 0, clean_steps: int = 250, noisy_steps: int = 400) -> None:
    """Train the tiny policy from scratch, in about two minutes on two cores: supervised on scripted demonstrations."""
    _check_empty(out)
    for name, steps in (("clean_steps", clean_steps), ("noisy_steps", noisy_steps)):
        if steps < 0:
            raise UserError(f"{name} is {steps}; it must be at least 0")
    from calibadv.world.warm_start import make_policy

    make_policy(out, seed, clean_steps, noisy_steps)


def _check_empty(out: Path) -> None:
    """Check that a folder does not exist or is empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out '{out}' exists and is not an empty folder; name another folder, or remove it")


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
