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


def policy(out: Path, seed: int = 0, clean_steps: int = 250, noisy_steps: int = 400) -> None:
    """Make the tiny policy from nothing, in about two minutes on two cores: supervised on scripted demonstrations.

    Args:
        out: Hugging Face folder to write; it must be empty or not there.
        seed: Of the initial weights and the demonstrations. The embedded world is never among their worlds.
        clean_steps: Steps on demonstrations without a mistake.
        noisy_steps: Steps on demonstrations with mistakes, after those.

    Raises:
        UserError: the folder holds something, or a number of steps is negative.
    """
    check_empty(out)
    for name, steps in (("clean_steps", clean_steps), ("noisy_steps", noisy_steps)):
        if steps < 0:
            raise UserError(f"{name} is {steps}; it must be at least 0")
    from calibadv.world.warm_start import make_policy

    make_policy(out, seed, clean_steps, noisy_steps)


def check_empty(out: Path) -> None:
    """Refuse to write into a file, or into a folder that is not empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out '{out}' exists and is not an empty folder; name another folder, or remove it")


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
