"""Recorded rollouts of one or more files, and the batches that they were trained in."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibadv.errors import UserError
from calibadv.io.jsonl import read_jsonl
from calibadv.runs.rollouts import Record, rollout_from_json
from calibadv.types import Rollout


@dataclass(frozen=True, slots=True)
class RecordedRollouts:
    """B recorded rollouts.

    Attributes:
        files: [B] the file of each.
        records: [B] JSON objects.
        rollouts: [B] the same, parsed.
    """

    files: list[Path] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)

    def batches(self) -> list[list[int]]:
        """Rows of each batch: the rollouts of one step of one file, as in training."""
        rows_of: dict[tuple[Path, int], list[int]] = defaultdict(list)
        for row, (file, rollout) in enumerate(zip(self.files, self.rollouts, strict=True)):
            rows_of[file, rollout.step].append(row)
        return list(rows_of.values())

    def check_distinct_steps(self) -> None:
        """Check that no step is in two files: in one file to be written they would become one batch."""
        owners: dict[int, Path] = {}
        for file, rollout in zip(self.files, self.rollouts, strict=True):
            owner = owners.setdefault(rollout.step, file)
            if owner != file:
                raise UserError(
                    f"'{owner}' and '{file}' both hold step {rollout.step}, which would become one batch in the file "
                    "to be written; replay them one at a time, or without --out"
                )


def read_recorded_rollouts(files: Sequence[Path]) -> RecordedRollouts:
    """Read rollout files."""
    recorded = RecordedRollouts()
    for file in files:
        before = len(recorded.records)
        for number, record in read_jsonl(file, "rollout file"):
            try:
                _check_finite(record, f"line {number}: ")
                rollout = rollout_from_json(record, number)
            except ValueError as error:
                raise UserError(f"{file}, {error}") from error
            recorded.files.append(file)
            recorded.records.append(record)
            recorded.rollouts.append(rollout)
        if len(recorded.records) == before:
            raise UserError(f"rollout file '{file}' is empty; it needs at least one rollout")
    return recorded


def _check_finite(value: Any, name: str) -> None:
    """Check that a record has no NaN or Infinity, which Python's parser accepts, JSON does not, and we do not write."""
    if isinstance(value, dict):
        for key, member in value.items():
            _check_finite(member, f"{name}.{key}" if name[-1] != " " else f"{name}{key}")
    elif isinstance(value, list):
        for index, member in enumerate(value):
            _check_finite(member, f"{name}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}; write a finite number, or null where there is none")
