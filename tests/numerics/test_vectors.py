"""The published method's numbers (see vectors/README.md), from text to advantages through the public API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibadv.analysis.replay import replay
from calibadv.batch import collate, turn_values
from calibadv.calibrators import AnswerRebalance, SoftPenalty
from calibadv.estimators import GRPO
from calibadv.interfaces import Calibrator
from calibadv.rewards import F1, credit_rollouts, score_rollouts
from calibadv.runs.rollouts import read_rollouts
from calibadv.types import Rollout

VECTORS = Path(__file__).parents[1] / "vectors" / "calibration.jsonl"
TOLERANCE = 1e-5


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    return [line["expected"] for line in read_lines(VECTORS)]


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    return credit_rollouts(score_rollouts(read_rollouts(VECTORS), F1()))


def test_all_vectors_are_read(rollouts: list[Rollout]) -> None:
    assert len(rollouts) == 529
    assert len({rollout.question.id for rollout in rollouts}) == 120


def test_validity(rollouts: list[Rollout], expected: list[dict[str, Any]]) -> None:
    assert [rollout.format_valid for rollout in rollouts] == [each["format_valid"] for each in expected]


def test_scores(rollouts: list[Rollout], expected: list[dict[str, Any]]) -> None:
    scores = [each["score"] for each in expected]
    assert [rollout.score for rollout in rollouts] == pytest.approx(scores, abs=TOLERANCE, rel=0)


def test_step_correctness(rollouts: list[Rollout], expected: list[dict[str, Any]]) -> None:
    for rollout, each in zip(rollouts, expected, strict=True):
        assert list(rollout.step_correctness) == pytest.approx(each["step_correctness"], abs=TOLERANCE, rel=0)


ARMS: dict[str, list[Calibrator]] = {
    "grpo": [],
    "soft": [SoftPenalty()],
    "rebalance": [AnswerRebalance()],
    "calibadv": [SoftPenalty(), AnswerRebalance()],
    "calibadv_lambda_1_5": [SoftPenalty(), AnswerRebalance(target_ratio=1.5)],
}


@pytest.mark.parametrize("arm", ARMS)
def test_advantages(arm: str, rollouts: list[Rollout], expected: list[dict[str, Any]]) -> None:
    batch = collate(rollouts)
    advantages = GRPO().estimate(batch)
    for calibrator in ARMS[arm]:
        advantages, _ = calibrator.calibrate(batch, advantages)
    for values, each in zip(turn_values(batch, advantages), expected, strict=True):
        assert values == pytest.approx(each["advantages"][arm], abs=TOLERANCE, rel=0)


OVERLAYS = {
    "grpo": [],
    "soft": ["calibrators/soft_penalty"],
    "rebalance": ["calibrators/answer_rebalance"],
    "calibadv": ["calibrators/calibadv"],
    "calibadv_lambda_1_5": ["calibrators/calibadv_lambda_1_5"],
}


@pytest.mark.parametrize("arm", OVERLAYS)
def test_replay(arm: str, tmp_path: Path) -> None:
    replay([VECTORS], tmp_path / "out.jsonl", OVERLAYS[arm])
    lines, given = read_lines(tmp_path / "out.jsonl"), read_lines(VECTORS)
    computed = ("format_valid", "score", "step_correctness", "advantages")
    assert [{k: v for k, v in line.items() if k not in computed} for line in lines] == given
    for line in lines:
        expected = line["expected"]
        assert line["format_valid"] == expected["format_valid"]
        assert line["score"] == pytest.approx(expected["score"], abs=TOLERANCE, rel=0)
        assert line["step_correctness"] == pytest.approx(expected["step_correctness"], abs=TOLERANCE, rel=0)
        for column, method in (("estimated", "grpo"), ("calibrated", arm)):
            values = expected["advantages"][method]
            assert line["advantages"][column] == pytest.approx(values, abs=TOLERANCE, rel=0)
