"""Runs to compare: found below the folders given, and read into one record each."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from calibadv.analysis.compare.curve_docs import known_tags
from calibadv.analysis.compare.curves import Curves, event_files, read_curves
from calibadv.errors import UserError
from calibadv.runs.folder import STUDY_FILE, RunFolder
from calibadv.runs.settings import changed_settings, method_settings

_SEED = re.compile(r"(?:^|seed|[-_=.])(\d+)$")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Run:
    """The content of one run folder; ``settings`` and ``planned`` are None for a run of another program."""

    path: Path
    label: str  # its name in the report: the path below the common folder of all runs
    seed: int | None  # None if unknown
    settings: Mapping[str, Any] | None  # the resolved config, flat, without what may differ in an arm
    results: Mapping[str, Any]  # content of results.json; empty without one
    curves: Curves  # by our names
    planned: int | None  # rollout steps that the config asks for
    notes: Sequence[str] = field(default=())  # remarks for the warnings of the report

    @property
    def is_calibadv_run(self) -> bool:
        """True if calibadv made it, and not another program."""
        return self.settings is not None

    @property
    def steps_done(self) -> int:
        """Rollout steps that results.json or else the curves record."""
        last = max((max(curve) for curve in self.curves.values()), default=0)
        return int(self.results.get("rollout_step", last))

    @property
    def finished(self) -> bool:
        """True if it is trained to the end and validated, as far as its files show."""
        if self.planned is None:
            return bool(self.validations)
        done = int(self.results.get("rollout_step", 0)) >= self.planned or self.stopped_by_guard
        return done and bool(self.validations)

    @property
    def stopped_by_guard(self) -> bool:
        """True if a CollapseGuard ended it; it counts as finished, so that a comparison includes such failures."""
        return bool(self.results.get("stopped_by_guard"))

    @property
    def validations(self) -> list[dict[str, float]]:
        """Each validation: ``step``, ``f1`` and its other metrics; empty if F1 is unknown."""
        if self.is_calibadv_run:
            return [dict(row) for row in self.results.get("validations", ()) if "f1" in row]
        names = [tag.removeprefix("val/") for tag in self.curves if tag.startswith("val/")]
        steps = self.curves.get("val/f1", {})
        found = {name: self.curves[f"val/{name}"] for name in names}
        return [
            {"step": step, **{name: curve[step] for name, curve in found.items() if step in curve}} for step in steps
        ]


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Find the run folders among and below some folders."""
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"run '{folder}' is not a folder; give run folders, or folders that hold such")
        below = list(_walk(folder.resolve()))
        if not below:
            raise UserError(
                f"'{folder}' holds no run: no config.yaml of a run, and no TensorBoard event files; "
                "give run folders, or folders that hold such"
            )
        found |= dict.fromkeys(below)
    return list(found)


def _walk(folder: Path) -> Iterator[Path]:
    if event_files(folder) or _is_ours(folder):
        yield folder
    else:
        yield from _below(folder)


def _below(folder: Path) -> Iterator[Path]:
    arms = _arms_of_study(folder)

    def index(path: Path) -> tuple[int, list[tuple[int, str]]]:
        return (arms.index(path.name) if path.name in arms else len(arms), _natural(path))

    for path in sorted(folder.iterdir(), key=index):
        if path.is_dir() and not path.name.startswith("."):
            yield from _walk(path)


def _arms_of_study(folder: Path) -> list[str]:
    """Arms in the order of the study; empty if the folder is not of a study."""
    record = folder / STUDY_FILE
    try:
        content = json.loads(record.read_text("utf-8")) if record.is_file() else None
    except ValueError:
        content = None
    return list(content["arms"]) if isinstance(content, dict) and isinstance(content.get("arms"), dict) else []


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(path.name)]


def _is_ours(folder: Path) -> bool:
    config = folder / "config.yaml"
    return config.is_file() and "rollout_steps" in config.read_text("utf-8", errors="replace")


def read_runs(paths: Sequence[Path], names: Mapping[str, str]) -> Iterator[Run]:
    """Read run folders."""
    common = Path(os.path.commonpath([path.parent for path in paths]))
    for path in paths:
        label = path.relative_to(common).as_posix()
        yield _read_ours(path, label) if _is_ours(path) else _read_foreign(path, label, names)


def _read_ours(path: Path, label: str) -> Run:
    folder = RunFolder(path)
    started, newest = folder.config(None), folder.newest_config()
    first = _read_yaml(started)
    last = first if newest == started else _read_yaml(newest)
    try:
        results = folder.read_results()
    except ValueError as error:
        raise UserError(f"'{folder.results}' is no JSON ({error}); copy it again, or leave its run out") from error
    changed = changed_settings(first, last)
    curves = read_curves(path)
    notes = [f"{label}: resumed with other settings: {', '.join(changed)}"] if changed else []
    if not curves:
        notes.append(f"{label}: no TensorBoard curves; only the results of its validations are shown")
    notes += _not_finite(curves, label)
    inside = [found.relative_to(path).as_posix() for found in _below(path) if _is_ours(found)]
    if inside:
        notes.append(f"{label}: the runs inside its folder are not compared ({', '.join(inside)}); move them out")
    seed = last.get("seed_everything")
    return Run(
        path=path,
        label=label,
        seed=seed if isinstance(seed, int) else None,
        settings=method_settings(last),
        results=results,
        curves={**curves, **_validation_curves(results.get("validations", ()))},
        planned=int(last["model"]["rollout_steps"]),
        notes=notes,
    )


def _validation_curves(validations: Sequence[Mapping[str, float]]) -> Curves:
    """Curves of the validations, not rounded to 32 bits as those of TensorBoard are."""
    curves: Curves = {}
    for row in validations:
        for name, value in row.items():
            if name != "step":
                curves.setdefault(f"val/{name}", {})[int(row["step"])] = float(value)
    return curves


def _read_foreign(path: Path, label: str, names: Mapping[str, str]) -> Run:
    read = read_curves(path)
    tags = names or _known_tags(read)
    curves = {ours: read[theirs] for ours, theirs in tags.items() if theirs in read}
    if not curves:
        raise _without_known_curves(path, sorted(read), bool(names))
    missing = [f"{ours} ({theirs})" for ours, theirs in names.items() if ours not in curves]
    notes = [f"{label}: without {', '.join(missing)}, which the name map names"] if missing else []
    notes += _not_finite(curves, label)
    found = _SEED.search(path.name)
    return Run(path, label, int(found[1]) if found else None, None, {}, curves, None, notes)


def _without_known_curves(path: Path, tags: Sequence[str], mapped: bool) -> UserError:
    shown = ", ".join(tags[:12]) + (", ..." if len(tags) > 12 else "")
    reason = "tags of the name map" if mapped else "curves; map its tags with --names"
    return UserError(f"run '{path}' is not of calibadv, and has none of our {reason}. It has: {shown or 'no scalars'}")


def _not_finite(curves: Curves, label: str) -> list[str]:
    counts = {tag: sum(not math.isfinite(value) for value in curve.values()) for tag, curve in curves.items()}
    found = [f"{tag} ({count} steps)" for tag, count in counts.items() if count]
    return [f"{label}: not finite, and so not drawn: {', '.join(found)}"] if found else []


def _known_tags(curves: Curves) -> dict[str, str]:
    return {tag: tag for tag in curves if any(pattern.fullmatch(tag) for pattern in known_tags())}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{path}' is no YAML ({reason}); copy it again, or leave its run out") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"'{path}' is no config of a run; copy it again, or leave its run out")
    return content
