"""Curves of a run folder: the scalars of its TensorBoard event files, and bands over the seeds of an arm."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from calibadv.analysis.statistics import Floats
from calibadv.errors import UserError

Curve = dict[int, float]
Curves = dict[str, Curve]

_MAX_POINTS = 60
# With more seeds, single seeds have no lines of their own.
_MAX_SEED_LINES = 5


def event_files(folder: Path) -> list[Path]:
    """The event files that lie directly in a folder."""
    return sorted(path for path in folder.glob("*tfevents*") if path.is_file())


def read_curves(folder: Path) -> Curves:
    """Read the scalars of a run.

    Where a run was resumed, what earlier files hold beyond the point of resuming is dropped; where a step occurs twice,
    the later value counts.
    """
    curves: dict[str, Curve] = defaultdict(dict)
    for path in event_files(folder):
        _read_file(path, curves)
    return {tag: dict(sorted(curve.items())) for tag, curve in curves.items() if curve}


def _read_file(path: Path, curves: dict[str, Curve]) -> None:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog

    tensors: set[str] = set()
    read = 0
    for event in LegacyEventFileLoader(str(path)).Load():
        read += 1
        if event.session_log.status == SessionLog.START:
            for curve in curves.values():
                for step in [step for step in curve if step >= event.step]:
                    del curve[step]
        for value in event.summary.value:
            number = _scalar(value, tensors)
            if number is not None:
                curves[value.tag][event.step] = number
    if read < _count_records(path):  # the loader stops silently at damage
        raise UserError(f"event file '{path}' is damaged after {read} records; copy it again, or leave its run out")


def _scalar(value: Any, tensors: set[str]) -> float | None:
    """The number of a scalar summary value; newer writers mark a tag as scalar only at its first value."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.metadata.plugin_data.plugin_name == "scalars":
        tensors.add(value.tag)
    if value.tag not in tensors:
        return None
    from tensorboard.util.tensor_util import make_ndarray

    return float(make_ndarray(value.tensor).item())


def _count_records(path: Path) -> int:
    """Records of an event file, by their frames: length (8 bytes), checksum (4), record, checksum (4)."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    count, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            length, checksum = struct.unpack("<QI", header)
            if checksum != masked_crc32c(header[:8]):
                return count + 1  # one that cannot be read
            if file.tell() + length + 4 > size:
                break
            file.seek(length + 4, 1)
            count += 1
    return count


def read_name_map(path: Path, known: Iterable[Any]) -> dict[str, str]:
    """Read a name map: from names of our curves to those of another program."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"name map '{path}' cannot be read ({reason}); give a YAML file of 'our tag: their tag'"
        ) from error
    entries = content.items() if isinstance(content, dict) else []
    if not entries or not all(isinstance(word, str) for entry in entries for word in entry):
        raise UserError(f"name map '{path}' is no map of tags; write one 'our tag: their tag' a line")
    patterns = list(known)
    for ours in content:
        if not any(pattern.fullmatch(ours) for pattern in patterns):
            raise UserError(f"name map '{path}': '{ours}' is not one of our curves, which docs/curves.md lists")
    return dict(content)


@dataclass(frozen=True, slots=True)
class Band:
    """One metric of one arm, over its seeds."""

    steps: Floats  # [P] where there is a point
    mean: Floats  # [P] over the seeds that have it
    low: Floats  # [P] mean minus one standard deviation, but not below the lowest seed
    high: Floats  # [P] mean plus one standard deviation, but not above the highest seed
    seeds: Floats  # [S, P] each seed, NaN where it has no point; S is 0 where there are more than five


def step_windows(curves: Iterable[Curve]) -> list[list[int]]:
    """Divide the steps of several curves into windows, at most 60, so that a plot has few points."""
    steps = sorted({step for curve in curves for step in curve})
    width = max(1, -(-len(steps) // _MAX_POINTS))
    return [steps[start : start + width] for start in range(0, len(steps), width)]


def seed_band(curves: Sequence[Curve], grid: Sequence[Sequence[int]]) -> Band:
    """Return the band of one metric over the seeds of an arm."""
    rows = np.array([[_mean_within(curve, window) for window in grid] for curve in curves])
    steps = np.array([sum(window) / len(window) for window in grid])
    present = np.isfinite(rows)
    counts = present.sum(0)
    kept = counts > 0
    rows, present, counts, steps = rows[:, kept], present[:, kept], counts[kept], steps[kept]
    values = np.where(present, rows, 0.0)
    mean = values.sum(0) / counts
    squares = (np.where(present, rows - mean, 0.0) ** 2).sum(0)
    spread = np.sqrt(squares / np.maximum(counts - 1, 1))
    lowest = np.where(present, rows, np.inf).min(0)
    highest = np.where(present, rows, -np.inf).max(0)
    shown = rows if 1 < len(rows) <= _MAX_SEED_LINES else rows[:0]
    return Band(steps, mean, np.maximum(mean - spread, lowest), np.minimum(mean + spread, highest), shown)


def _mean_within(curve: Curve, window: Sequence[int]) -> float:
    values = [curve[step] for step in window if step in curve and np.isfinite(curve[step])]
    return sum(values) / len(values) if values else float("nan")
