"""Demonstrations chosen among rollouts: those that scored well (rejection sampling)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path

from calibadv.demonstrations.writing import Demonstrations
from calibadv.errors import UserError
from calibadv.runs.folder import RunFolder
from calibadv.runs.rollouts import read_rollouts
from calibadv.types import Rollout


def rollout_files(source: Path) -> list[Path]:
    """Return the rollout files of a run folder, or the file itself."""
    if not source.is_dir():
        return [source]
    files = sorted(RunFolder(source).rollouts.glob("*.jsonl"))
    if not files:
        raise UserError(f"--from {source} holds no rollouts; give a run folder, or a rollout file")
    return files


def select(rollouts: Iterable[Rollout], min_score: float, count: int) -> Demonstrations:
    """Choose rollouts by their score, different ones, as evenly over the questions as there are."""
    found = Demonstrations([])
    seen: set[tuple[str, ...]] = set()
    of_question: defaultdict[str, list[Rollout]] = defaultdict(list)
    reasons: Counter[str] = found.left_out
    for rollout in rollouts:
        text = (rollout.question.id, *(segment.text for segment in rollout.segments))
        if not rollout.format_valid:
            reasons[f"not valid ({rollout.status})"] += 1
        elif rollout.score < min_score:
            reasons["a lower score"] += 1
        elif text in seen:
            reasons["the same as another"] += 1
        else:
            seen.add(text)
            of_question[rollout.question.id].append(rollout)
    in_turn = chain.from_iterable(zip_longest(*of_question.values()))
    found.rollouts = [rollout for rollout in in_turn if rollout is not None][:count]
    return found


def read_all(files: Iterable[Path]) -> Iterable[Rollout]:
    """Read the rollouts of several files."""
    return chain.from_iterable(map(read_rollouts, files))
