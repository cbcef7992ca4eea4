"""Apply a method to recorded rollouts: from their text to advantages, without a model."""

from __future__ import annotations

from argparse import ArgumentError
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from calibadv import calibrators, estimators, rewards  # noqa: F401  (only imported classes have short names)
from calibadv.agent.collate import collate, turn_values
from calibadv.callbacks.calibration import AdvantageCalibration
from calibadv.cli.configs import CALLBACKS, calibrations, configs_folder, read_config, resolve_config, scan_overlays
from calibadv.cli.explain import explain
from calibadv.interfaces import AdvantageEstimator, Calibrator, Reward
from calibadv.rewards.evidence import credit_rollouts
from calibadv.rewards.scoring import score_rollouts
from calibadv.rollout_files import Record, read_records, write_records
from calibadv.types import Rollout


@dataclass(frozen=True, slots=True)
class Method:
    """What decides the advantages of given rollouts."""

    reward: Reward
    estimator: AdvantageEstimator
    calibrators: Sequence[Calibrator]


def replay(rollouts: Path, out: Path, config: list[Path | str] | None = None) -> None:
    """Recompute validity, score, evidence and advantages of recorded rollouts, without a model.

    Groups are the rollouts of one question in one step, and a step is one batch, as in training.

    Args:
        rollouts: JSON lines of rollouts; order and unknown keys are kept.
        out: File to write, one line per rollout, which appears when all is done.
        config: Overlays as for fit, in order: packaged names such as calibrators/calibadv, or paths. Without any, the
            method is GRPO with F1 as reward.

    Raises:
        ValueError: a rollout file or an overlay cannot be used; ``out`` is then left as it was.
    """
    paths = [resolve_config(str(name)) for name in config or []]
    scan_overlays(paths)
    method = load_method([configs_folder() / "base.yaml", *paths])
    records, recorded = [], []
    for record, rollout in read_records(rollouts):
        records.append(record)
        recorded.append(rollout)
    if not records:
        raise ValueError(f"rollout file '{rollouts}' is empty; it needs at least one rollout")
    write_records(out, replay_records(records, recorded, method))


def load_method(paths: Sequence[Path]) -> Method:
    """Instantiate the parts of merged configs that decide advantages, and nothing else of them.

    Args:
        paths: config files in the order in which they apply; together they name a reward and an estimator.

    Returns:
        The reward, the estimator, and the calibrators of the AdvantageCalibration callback if there is one.

    Raises:
        ValueError: a config names a part that there is not, or gives one what it does not take.
    """
    configs = [read_config(path) for path in paths]
    installed = [entry for _, entry in calibrations(configs)]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model.reward", type=Reward, required=True)
    parser.add_argument("--model.estimator", type=AdvantageEstimator, required=True)
    if installed:
        parser.add_argument(f"--{CALLBACKS}", type=AdvantageCalibration)
    merged = None
    try:
        for config in configs:
            part = {key: value for key, value in config.values.items() if _decides_advantages(key)}
            merged = parser.parse_object(part, namespace=merged)
        if installed:
            merged = parser.parse_object({CALLBACKS: installed[-1]}, namespace=merged)
        parts = parser.instantiate(merged)
    except ArgumentError as error:
        raise ValueError(explain(str(error))) from error
    return Method(
        reward=parts.model.reward,
        estimator=parts.model.estimator,
        calibrators=parts[CALLBACKS].calibrators if installed else [],
    )


def _decides_advantages(key: str) -> bool:
    return f"{key}.".startswith(("model.reward.", "model.estimator."))


def replay_records(records: Sequence[Record], rollouts: Sequence[Rollout], method: Method) -> list[Record]:
    """Fill in what a method computes of each record.

    Args:
        records: JSON objects of rollouts.
        rollouts: the rollouts that they describe.
        method: reward, estimator and calibrators.

    Returns:
        New records in the same order: those given, with ``format_valid``, ``score``, ``step_correctness`` and
        ``advantages`` set, and ``status`` and ``answer_score`` brought up to date where they are recorded.
    """
    steps: dict[int, list[int]] = defaultdict(list)
    for row, rollout in enumerate(rollouts):
        steps[rollout.step].append(row)
    filled = list(records)
    for rows in steps.values():
        computed = _compute([rollouts[row] for row in rows], method)
        for row, values in zip(rows, computed, strict=True):
            absent = {"status", "answer_score"} - records[row].keys()
            filled[row] = records[row] | {key: value for key, value in values.items() if key not in absent}
    return filled


def _compute(rollouts: Sequence[Rollout], method: Method) -> list[dict[str, Any]]:
    scored = credit_rollouts(score_rollouts(rollouts, method.reward))
    batch = collate(scored)
    estimated = calibrated = method.estimator.estimate(batch)
    for calibrator in method.calibrators:
        calibrated, _ = calibrator.calibrate(batch, calibrated)
    columns = zip(scored, turn_values(batch, estimated), turn_values(batch, calibrated), strict=True)
    return [
        {
            "status": str(rollout.status),
            "format_valid": rollout.format_valid,
            "score": rollout.score,
            "answer_score": rollout.answer_score,
            "step_correctness": list(rollout.step_correctness),
            "advantages": {"estimated": before, "calibrated": after},
        }
        for rollout, before, after in columns
    ]
