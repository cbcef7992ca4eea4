"""``calibadv replay``: recompute the advantages of recorded rollouts under one or several methods."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any

from rich.console import Console

from calibadv.analysis.replay.arms import ReplayArm, load_arms
from calibadv.analysis.replay.comparison import Comparison
from calibadv.analysis.replay.recording import RecordedRollouts, read_recorded_rollouts
from calibadv.analysis.replay.results import ReplayResults
from calibadv.analysis.replay.table import print_results
from calibadv.errors import UserError
from calibadv.io.progress_bar import tracked
from calibadv.runs.paths import check_not_input, find_rollout_files
from calibadv.runs.rollouts import Record, write_records


def replay(
    rollouts: list[Path],
    out: Path | None = None,
    config: list[Path | str] | None = None,
    arm: list[str] | None = None,
    top: int = 5,
    json: bool = False,
) -> None:
    """Recompute validity, score, evidence and advantages of recorded rollouts, without a model, and compare methods.

    Groups are the rollouts of one question in one step, and a step of a file is one batch, as in training.

    Args:
        rollouts: One or more files of rollouts, or folders of runs or studies, which stand for the
            train-step-*.jsonl in them.
        out: Where to write the rollouts with what was computed: with --arm a folder, which gets ARM.jsonl for each arm;
            without, a file. Order and unknown keys are kept. By default nothing is written.
        config: Overlays as for fit, in order: packaged names such as calibrators/calibadv, or paths. They hold for all
            arms, and come before the arm's own. Without any, the method is GRPO with F1 as reward.
        arm: NAME, or NAME=OVERLAY[+OVERLAY...], as for study; once for each method. The first is compared with each of
            the others. Without any, the one method is that of --config.
        top: How many of the turns on which two methods differ most are shown; 0 for none.
        json: Print the figures as a JSON object, the texts uncut.

    Raises:
        UserError: a rollout file or an overlay cannot be used, or a method needs the model; ``out`` is then left as
            it was.
    """
    if top < 0:
        raise UserError(f"top is {top}; it must be at least 0 (0 shows no turns)")
    files = find_rollout_files(rollouts)
    arms = load_arms(arm or [], [str(name) for name in config or []])
    outs = _output_files(out, arms, in_folder=bool(arm))
    check_not_input(outs.values(), files)
    recorded = read_recorded_rollouts(files)
    if outs:
        recorded.check_distinct_steps()
    results, filled = _apply(recorded, arms, top, keep=bool(outs))
    for name, records in filled.items():
        write_records(outs[name], records)
    if json:
        Console().out(dumps(_as_json(results, arms)), highlight=False)
    else:
        print_results(results, arms)


def _output_files(out: Path | None, arms: list[ReplayArm], in_folder: bool) -> dict[str, Path]:
    if out is None:
        return {}
    if in_folder and out.exists() and not out.is_dir():
        raise UserError(f"out '{out}' is a file, and with --arm it must be a folder; give another --out")
    return {arm.name: out / f"{arm.name}.jsonl" if in_folder else out for arm in arms}


def _apply(
    recorded: RecordedRollouts, arms: list[ReplayArm], top: int, keep: bool
) -> tuple[ReplayResults, dict[str, list[Record]]]:
    """The results, and with ``keep`` the records with computed values by the name of the arm."""
    comparison = Comparison([arm.name for arm in arms], recorded)
    filled = {arm.name: list(recorded.records) for arm in arms} if keep else {}
    batches = recorded.batches()
    for rows in tracked(batches, "Replaying", len(batches)):
        rollouts = [recorded.rollouts[row] for row in rows]
        replayed = {arm.name: arm.apply(rollouts) for arm in arms}
        comparison.add(rows, replayed)
        for name, records in filled.items():
            computed = replayed[name].records([recorded.records[row] for row in rows])
            for row, record in zip(rows, computed, strict=True):
                records[row] = record
    return comparison.results(top), filled


def _as_json(results: ReplayResults, arms: list[ReplayArm]) -> dict[str, Any]:
    content = asdict(results)
    for entry, arm in zip(content["arms"], arms, strict=True):
        entry["reward"] = type(arm.method.reward).__name__
        entry["estimator"] = type(arm.method.estimator).__name__
        entry["calibrators"] = [type(calibrator).__name__ for calibrator in arm.method.calibrators]
        entry["without_effect"] = list(arm.ignored_settings)
    return content
