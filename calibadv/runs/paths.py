"""Finding run folders and rollout files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from calibadv.errors import UserError


def find_rollout_files(paths: Sequence[Path]) -> list[Path]:
    """Name the rollout files."""
    found: list[Path] = []
    for path in paths:
        files = sorted(path.rglob("train-step-*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise UserError(
                f"folder '{path}' holds no train-step-*.jsonl; give rollout files, or the folder of a run or study"
            )
        found += files
    if not found:
        raise UserError("rollouts names no file; give at least one")
    return list(dict.fromkeys(found))


def refuse_to_replace(outs: Iterable[Path], files: Sequence[Path]) -> None:
    """Refuse to write over what is read."""
    read = {file.resolve() for file in files}
    for out in outs:
        if out.resolve() in read:
            raise UserError(f"out '{out}' is one of the rollout files, which it would replace; give another --out")


def short_names(files: Sequence[Path]) -> list[str]:
    """Tell files apart by as much of their paths as is needed."""
    paths = [path.resolve() for path in files]
    folder = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(folder).as_posix() for path in paths]
