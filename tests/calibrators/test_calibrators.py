from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from support.records import answer, rollout, search

from calibadv.batch import RolloutBatch, collate, turn_values
from calibadv.calibrators import AnswerRebalance, SoftPenalty
from calibadv.callbacks import AdvantageCalibration
from calibadv.estimators import GRPO
from calibadv.interfaces import Calibrator
from calibadv.rewards import F1, credit_rollouts, score_rollouts
from calibadv.types import Rollout, RolloutStatus


def batch_of(*rollouts: Rollout) -> RolloutBatch:
    return collate(credit_rollouts(score_rollouts(rollouts, F1())))


def calibrated(batch: RolloutBatch, *calibrators: Calibrator) -> list[list[float] | None]:
    advantages = GRPO().estimate(batch)
    for calibrator in calibrators:
        advantages, _ = calibrator.calibrate(batch, advantages)
    return turn_values(batch, advantages)


GOOD = rollout(search("a", "b"), answer("gold", tokens=2))
BAD = rollout(search("a", "x"), search("y"), answer("no", tokens=4))
# Rewards 1 and 0: mean 0.5, std sqrt(0.5), A = +-0.707106
A = 0.5 / (math.sqrt(0.5) + 1e-6)


def test_grpo_gives_every_turn_the_advantage_of_its_rollout() -> None:
    batch = batch_of(GOOD, BAD)
    assert turn_values(batch, GRPO().estimate(batch)) == [pytest.approx([A, A]), pytest.approx([-A, -A, -A])]
    assert bool((GRPO().estimate(batch)[~batch.loss_mask] == 0).all())


def test_soft_penalty_halves_the_search_that_found_half_evidence() -> None:
    # silver is {a, b}; BAD's first search found a of {a, x}: correctness 0.5; its second found nothing
    assert calibrated(batch_of(GOOD, BAD), SoftPenalty()) == [
        pytest.approx([A, A]),
        pytest.approx([-A / 2, -A, -A]),
    ]


def test_answer_rebalance_weighs_tokens() -> None:
    # answers: +A over 2 tokens, -A over 4: P = 2 A, N = 4 A, factor 2
    batch = batch_of(GOOD, BAD)
    assert calibrated(batch, AnswerRebalance()) == [pytest.approx([A, 2 * A]), pytest.approx([-A, -A, -A])]
    assert calibrated(batch, AnswerRebalance(1.5))[0] == pytest.approx([A, 3 * A])


def test_both_parts_together() -> None:
    assert calibrated(batch_of(GOOD, BAD), SoftPenalty(), AnswerRebalance()) == [
        pytest.approx([A, 2 * A]),
        pytest.approx([-A / 2, -A, -A]),
    ]


def test_metrics_of_the_calibrators() -> None:
    batch = batch_of(GOOD, BAD)
    advantages = GRPO().estimate(batch)
    # two punished searches, one of them found evidence; one group, factor 2
    assert SoftPenalty().calibrate(batch, advantages)[1] == {"credit/softened": 0.5}
    assert AnswerRebalance().calibrate(batch, advantages)[1] == {"advantage/rebalance_factor": pytest.approx(2.0)}


def test_without_anything_to_calibrate_there_are_no_metrics() -> None:
    batch = batch_of(GOOD, GOOD)
    advantages = GRPO().estimate(batch)
    for calibrator in (SoftPenalty(), AnswerRebalance()):
        after, metrics = calibrator.calibrate(batch, advantages)
        assert metrics == {}
        assert bool((after == 0).all())


def test_calibrators_do_not_write_into_what_they_are_given() -> None:
    batch = batch_of(GOOD, BAD)
    advantages = GRPO().estimate(batch)
    before = advantages.clone(), batch.step_correctness.clone()
    for calibrator in (SoftPenalty(), AnswerRebalance(2.0)):
        calibrator.calibrate(batch, advantages)
    assert torch.equal(advantages, before[0])
    assert torch.equal(batch.step_correctness, before[1])


def test_all_invalid_groups_get_nothing() -> None:
    batch = batch_of(rollout(answer("gold")), rollout(search("a")), rollout(answer("no")))
    assert calibrated(batch, SoftPenalty(), AnswerRebalance()) == [[0.0], [0.0], [0.0]]


def test_a_group_of_one_keeps_its_searches_and_loses_its_answer() -> None:
    # A = 1 / (1 + 1e-6); an answer without a negative counterpart has nothing to be balanced with
    batch = batch_of(GOOD)
    assert calibrated(batch) == [pytest.approx([1.0, 1.0], abs=1e-5)]
    assert calibrated(batch, SoftPenalty(), AnswerRebalance()) == [pytest.approx([1.0, 0.0], abs=1e-5)]


def test_an_empty_answer_turn_has_no_tokens_to_balance() -> None:
    # the only wrong answer has no token: N = 0, so the right answer gets 0
    batch = batch_of(GOOD, rollout(search("x"), answer("no", tokens=0)))
    assert calibrated(batch, AnswerRebalance()) == [pytest.approx([A, 0.0]), pytest.approx([-A, 0.0])]


def test_the_answer_turn_of_a_rollout_that_ends_after_an_observation_is_its_last_message() -> None:
    cut = rollout(search("a", "b"), search("y", tokens=8), status=RolloutStatus.TRUNCATED)
    # N = 8 A over its last message, P = 2 A: factor 4; it is not valid, so its first search is not softened
    assert calibrated(batch_of(GOOD, cut), SoftPenalty(), AnswerRebalance()) == [
        pytest.approx([A, 4 * A]),
        pytest.approx([-A, -A]),
    ]


def test_a_failed_search_changes_nothing_for_its_group() -> None:
    failed = rollout(search("a"), answer("gold"), status=RolloutStatus.SEARCH_FAILED)
    with_failed = calibrated(batch_of(GOOD, failed, BAD), SoftPenalty(), AnswerRebalance())
    assert [with_failed[0], with_failed[2]] == calibrated(batch_of(GOOD, BAD), SoftPenalty(), AnswerRebalance())
    assert with_failed[1] is None


def test_a_group_does_not_depend_on_its_place_or_order() -> None:
    one = [GOOD, BAD, rollout(search("b"), answer("gold and more"))]
    two = [replace(r, step=1) for r in (BAD, GOOD)]
    expected = calibrated(batch_of(*one), SoftPenalty(), AnswerRebalance())
    mixed = calibrated(batch_of(two[0], one[2], one[0], two[1], one[1]), SoftPenalty(), AnswerRebalance())
    assert [mixed[2], mixed[4], mixed[1]] == [pytest.approx(values) for values in expected]


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_target_ratio_must_be_positive(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"target_ratio is .*; it must be a number above 0"):
        AnswerRebalance(target_ratio=ratio)


class Module(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.calibrators: list[Calibrator] = []


@pytest.fixture
def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def test_the_callback_installs_its_calibrators_for_every_stage(trainer: Trainer) -> None:
    module, calibrators = Module(), [SoftPenalty(), AnswerRebalance()]
    callback = AdvantageCalibration(calibrators)
    for stage in ("fit", "validate"):
        callback.setup(trainer, module, stage)
    assert module.calibrators == calibrators


def test_a_second_callback_is_refused(trainer: Trainer) -> None:
    module = Module()
    AdvantageCalibration([SoftPenalty()]).setup(trainer, module, "fit")
    with pytest.raises(ValueError, match="two AdvantageCalibration callbacks; keep one"):
        AdvantageCalibration([AnswerRebalance()]).setup(trainer, module, "fit")
