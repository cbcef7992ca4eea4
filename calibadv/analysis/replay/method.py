"""Methods: the parts of a config that decide the advantages of given rollouts, and their application."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser
from torch import Tensor

from calibadv import calibrators, estimators, rewards  # noqa: F401  (only imported classes have short names)
from calibadv.batch import RolloutBatch, collate, turn_values
from calibadv.calibrators import check_combination
from calibadv.callbacks.calibration import AdvantageCalibration
from calibadv.config.errors import explain
from calibadv.config.files import CALLBACKS, read_config
from calibadv.config.overlays import installed_calibrations
from calibadv.errors import UserError
from calibadv.interfaces import AdvantageEstimator, Calibrator, Reward
from calibadv.rewards.evidence import credit_rollouts
from calibadv.rewards.scoring import score_rollouts
from calibadv.runs.rollouts import Record
from calibadv.training.advantages import compute_advantages
from calibadv.types import Rollout


@dataclass(frozen=True, slots=True)
class Method:
    """The parts that decide the advantages of given rollouts."""

    reward: Reward
    estimator: AdvantageEstimator
    calibrators: Sequence[Calibrator]


@dataclass(frozen=True, slots=True)
class ReplayedBatch:
    """A batch of recorded rollouts with the advantages of a method."""

    batch: RolloutBatch  # B rollouts with scores and step correctness
    estimated: Tensor  # [B, T] advantages of the estimator
    calibrated: Tensor  # [B, T] advantages after the calibrators

    def records(self, recorded: Sequence[Record]) -> list[Record]:
        """The records with the computed values; keys that older files lack are not added."""
        columns = zip(
            recorded,
            self.batch.rollouts,
            turn_values(self.batch, self.estimated),
            turn_values(self.batch, self.calibrated),
            strict=True,
        )
        return [_fill(record, rollout, before, after) for record, rollout, before, after in columns]


def _fill(record: Record, rollout: Rollout, estimated: list[float] | None, calibrated: list[float] | None) -> Record:
    computed = {
        "status": str(rollout.status),
        "format_valid": rollout.format_valid,
        "score": rollout.score,
        "answer_score": rollout.answer_score,
        "step_correctness": list(rollout.step_correctness),
        "advantages": {"estimated": estimated, "calibrated": calibrated},
    }
    absent = {"status", "answer_score"} - record.keys()
    return record | {key: value for key, value in computed.items() if key not in absent}


def apply_method(rollouts: Sequence[Rollout], method: Method) -> ReplayedBatch:
    """Compute scores, step correctness and advantages of a batch of rollouts."""
    batch = collate(credit_rollouts(score_rollouts(rollouts, method.reward)))
    estimated, calibrated, _ = compute_advantages(batch, method.estimator, method.calibrators)
    return ReplayedBatch(batch, estimated, calibrated)


def load_method(paths: Sequence[Path]) -> Method:
    """Instantiate only those parts of merged configs that decide advantages."""
    configs = [read_config(path) for path in paths]
    installed = [entry for _, entry in installed_calibrations(configs)]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model.reward", type=Reward, required=True)
    parser.add_argument("--model.estimator", type=AdvantageEstimator, required=True)
    if installed:
        parser.add_argument(f"--{CALLBACKS}", type=AdvantageCalibration)
    merged = None
    try:
        for config in configs:
            part = {key: value for key, value in config.values.items() if decides_advantages(key)}
            merged = parser.parse_object(part, namespace=merged)
        if installed:
            merged = parser.parse_object({CALLBACKS: installed[-1]}, namespace=merged)
        parts = parser.instantiate(merged)
    except ArgumentError as error:
        raise UserError(explain(str(error))) from error
    method = Method(
        reward=parts.model.reward,
        estimator=parts.model.estimator,
        calibrators=parts[CALLBACKS].calibrators if installed else [],
    )
    check_combination(method.estimator, method.calibrators)
    return method


def decides_advantages(key: str) -> bool:
    """Check that a setting belongs to the reward or the estimator; calibrators are callbacks."""
    return f"{key}.".startswith(("model.reward.", "model.estimator."))
