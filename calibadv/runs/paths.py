"""Finding run folders and rollout files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from calibadv.errors import UserError


def find_rollout_files(paths: Sequence[Path]) -> list[Path]:
    """Return the rollout files among the paths and in the folders among them."""
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


def check_not_input(outs: Iterable[Path], files: Sequence[Path]) -> None:
    """Check that no output is one of the rollout files, which it would replace."""
    read = {file.resolve() for file in files}
    for out in outs:
        if out.resolve() in read:
            raise UserError(f"out '{out}' is one of the rollout files, which it would replace; give another --out")


def short_names(files: Sequence[Path]) -> list[str]:
    """Return the paths relative to their common folder."""
    paths = [path.resolve() for path in files]
    folder = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(folder).as_posix() for path in paths]
