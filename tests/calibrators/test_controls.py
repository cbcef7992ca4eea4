"""The calibrators beside CalibAdv's own: its controls, and rules that look at signs alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.records import answer, rollout, search
from torch import Tensor

from calibadv.batch import RolloutBatch, collate, turn_values
from calibadv.calibrators import (
    AnswerRebalance,
    ConstantPenalty,
    NegativeClip,
    NegativeScale,
    ShuffledPenalty,
    SoftPenalty,
    check_combination,
)
from calibadv.calibrators._penalty import find_negative_turns
from calibadv.estimators import GRPO, IGPO, MTGRPO, GiGPO
from calibadv.interfaces import AdvantageEstimator, Calibrator
from calibadv.numerics.credit import sign_masses
from calibadv.rewards import F1, credit_rollouts, score_rollouts
from calibadv.types import Rollout, RolloutStatus


def batch_of(*rollouts: Rollout) -> RolloutBatch:
    return collate(credit_rollouts(score_rollouts(rollouts, F1())))


def calibrated(batch: RolloutBatch, *calibrators: Calibrator) -> Tensor:
    advantages = GRPO().estimate(batch)
    for calibrator in calibrators:
        advantages, _ = calibrator.calibrate(batch, advantages)
    return advantages


def turns(batch: RolloutBatch, *calibrators: Calibrator) -> list[Any]:
    return turn_values(batch, calibrated(batch, *calibrators))


GOOD = rollout(search("a", "b"), answer("gold", tokens=2))
BAD = rollout(search("a", "x"), search("y"), answer("no", tokens=4), sample=1)
# Rewards 1 and 0: A = +-0.707106. Silver is {a, b}: BAD's searches have correctness 0.5 and 0. Searches have 3 tokens.
A = 0.5 / (math.sqrt(0.5) + 1e-6)


# By hand.


def test_a_constant_softens_all_punished_searches_alike() -> None:
    # the mean of 0.5 and 0 is 0.25
    assert turns(batch_of(GOOD, BAD), ConstantPenalty("batch_mean")) == [
        pytest.approx([A, A]),
        pytest.approx([-0.75 * A, -0.75 * A, -A]),
    ]
    assert turns(batch_of(GOOD, BAD), ConstantPenalty(0.4))[1] == pytest.approx([-0.6 * A, -0.6 * A, -A])


def test_shuffling_moves_the_evidence_to_another_punished_search() -> None:
    batch = batch_of(GOOD, BAD)
    found = {tuple(turns(batch, ShuffledPenalty(seed))[1]) for seed in range(20)}
    kept, moved = sorted(found)  # -A, -A/2 comes before -A/2, -A
    assert kept == pytest.approx((-A, -A / 2, -A))
    assert moved == pytest.approx((-A / 2, -A, -A))
    assert turns(batch, ShuffledPenalty())[0] == pytest.approx([A, A])


def test_negative_scale_weighs_the_signs() -> None:
    assert turns(batch_of(GOOD, BAD), NegativeScale(0.1, 0.5)) == [
        pytest.approx([0.1 * A, 0.1 * A]),
        pytest.approx([-0.5 * A] * 3),
    ]


def test_the_matched_scale_by_hand() -> None:
    # P = (3 + 2) A = 5 A, N = (3 + 3 + 4) A = 10 A. CalibAdv: the first search of BAD halves, N = (1.5 + 3 + 4) A; the
    # answer of GOOD doubles, P = (3 + 4) A. Weight: 5 x 8.5 / (10 x 7).
    batch = batch_of(GOOD, BAD)
    scaled, metrics = NegativeScale(match="calibadv").calibrate(batch, GRPO().estimate(batch))
    weight = 5 * 8.5 / (10 * 7)
    assert metrics == {"advantage/negative_weight": pytest.approx(weight)}
    assert turn_values(batch, scaled) == [pytest.approx([A, A]), pytest.approx([-weight * A] * 3)]


def test_negative_clip_by_hand() -> None:
    # the mean of the positive advantages is A
    batch = batch_of(GOOD, BAD)
    clipped, metrics = NegativeClip(0.5).calibrate(batch, GRPO().estimate(batch))
    assert turn_values(batch, clipped) == [pytest.approx([A, A]), pytest.approx([-A / 2] * 3)]
    assert metrics == {"advantage/clipped": 1.0}
    assert turns(batch, NegativeClip(1.5)) == turns(batch)


def test_negative_clip_takes_the_mean_over_tokens() -> None:
    # rewards 1, 0.5, 0 normalise to 1, 0, -1; in the other group of 4 to 1.5, -0.5, -0.5, -0.5, with 1 token more
    half = rollout(search("z"), answer("gold and or"), sample=2)
    far = [replace(r, question=replace(GOOD.question, id="far"), sample=n) for n, r in enumerate([GOOD, BAD, BAD, BAD])]
    batch = batch_of(GOOD, BAD, half, *far)
    # positive: 5 tokens of 1 and 5 of 1.5, mean 1.25; half of that is 0.625
    values = turns(batch, NegativeClip(0.5))
    assert values[1] == pytest.approx([-0.625] * 3, rel=1e-5)
    assert values[4] == pytest.approx([-0.5] * 3, rel=1e-5)


def test_metrics_of_the_controls() -> None:
    batch = batch_of(GOOD, BAD)
    advantages = GRPO().estimate(batch)
    assert ConstantPenalty().calibrate(batch, advantages)[1] == {
        "credit/softened": 1.0,
        "credit/constant_correctness": 0.25,
    }
    assert ShuffledPenalty().calibrate(batch, advantages)[1] == {"credit/softened": 0.5}
    assert NegativeScale(0.1).calibrate(batch, advantages)[1] == {}


CONTROLS = [
    ConstantPenalty(),
    ConstantPenalty(0.5),
    ShuffledPenalty(),
    NegativeScale(0.1),
    NegativeScale(match="calibadv"),
    NegativeClip(),
]


@pytest.mark.parametrize("calibrator", CONTROLS)
def test_without_anything_to_calibrate_nothing_changes(calibrator: Calibrator) -> None:
    batch = batch_of(GOOD, GOOD)
    after, metrics = calibrator.calibrate(batch, GRPO().estimate(batch))
    assert metrics == {}
    assert bool((after == 0).all())


def test_a_ratio_without_two_sides_cannot_be_matched() -> None:
    batch = batch_of(GOOD)  # a group of one: A is its reward, and no advantage is negative
    assert turns(batch, NegativeScale(match="calibadv")) == turns(batch)
    assert turns(batch, NegativeClip()) == turns(batch)
    negative = -batch.loss_mask.float()
    for calibrator in (NegativeScale(match="calibadv"), NegativeClip()):
        after, metrics = calibrator.calibrate(batch, negative)
        assert torch.equal(after, negative)
        assert metrics == {}


# Over any batch.

_SEARCHES = st.lists(st.sampled_from("abcdefgh"), max_size=3).map(lambda ids: search(*ids, think=" ".join(["t", *ids])))
_ANSWERS = st.sampled_from(["gold", "no", "gold and or", "gold or"])


@st.composite
def batches(draw: st.DrawFn) -> list[Rollout]:
    """Rollouts of two questions in any order, some of which failed."""
    rollouts = []
    for sample in range(draw(st.integers(2, 9))):
        searches = draw(st.lists(_SEARCHES, min_size=1, max_size=3))
        last = answer(draw(_ANSWERS), tokens=draw(st.integers(1, 5)))
        made = rollout(*searches, last, sample=sample, question_id=draw(st.sampled_from("pq")), step=3)
        failed = draw(st.integers(0, 5)) == 0
        rollouts.append(replace(made, status=RolloutStatus.SEARCH_FAILED) if failed else made)
    return rollouts


@settings(max_examples=40)
@given(batches(), st.integers(0, 5))
def test_shuffling_keeps_the_values_and_how_many_there_are(rollouts: list[Rollout], seed: int) -> None:
    batch = batch_of(*rollouts)
    negative = find_negative_turns(batch, GRPO().estimate(batch))
    before, after = batch.step_correctness, ShuffledPenalty(seed).shuffled_correctness(batch, negative)
    assert sorted(after[negative.searches].tolist()) == sorted(before[negative.searches].tolist())
    assert torch.equal(after[~negative.searches], before[~negative.searches])


@settings(max_examples=40)
@given(batches())
def test_the_constant_is_the_mean_correctness_of_the_punished_searches(rollouts: list[Rollout]) -> None:
    batch = batch_of(*rollouts)
    advantages = GRPO().estimate(batch)
    expected = [
        correctness
        for made, values in zip(batch.rollouts, turn_values(batch, advantages), strict=True)
        if values is not None
        for correctness, value in zip(made.step_correctness, values[:-1], strict=True)
        if value < 0
    ]
    assume(expected)
    metrics = ConstantPenalty().calibrate(batch, advantages)[1]
    assert metrics["credit/constant_correctness"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)


@settings(max_examples=40)
@given(batches(), st.sampled_from([0.1, 1.0, 3.0]))
def test_the_matched_scale_has_the_ratio_of_calibadv(rollouts: list[Rollout], positive_weight: float) -> None:
    batch = batch_of(*rollouts)
    positive, negative = sign_masses(calibrated(batch, SoftPenalty(), AnswerRebalance()))
    assume(positive and negative)
    scaled = sign_masses(calibrated(batch, NegativeScale(positive_weight, match="calibadv")))
    assert scaled[0] / scaled[1] == pytest.approx(positive / negative, rel=1e-4)


@settings(max_examples=40)
@given(batches(), st.sampled_from([0.25, 1.0, 2.0]))
def test_clipping_touches_only_what_is_far_below(rollouts: list[Rollout], bound: float) -> None:
    batch = batch_of(*rollouts)
    before, after = calibrated(batch), calibrated(batch, NegativeClip(bound))
    assume(bool((before > 0).any()))
    floor = -bound * before[before > 0].double().mean().item()
    assert after.min().item() >= floor - 1e-6
    assert torch.equal(after[before >= floor + 1e-6], before[before >= floor + 1e-6])


@pytest.mark.parametrize("calibrator", CONTROLS)
@settings(max_examples=40)
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_rollouts_does_not_matter(calibrator: Calibrator, rollouts: list[Rollout], random) -> None:
    order = list(range(len(rollouts)))
    random.shuffle(order)
    expected = turns(batch_of(*rollouts), calibrator)
    for row, found in zip(order, turns(batch_of(*(rollouts[row] for row in order)), calibrator), strict=True):
        assert found == (None if expected[row] is None else pytest.approx(expected[row], abs=1e-5))


@pytest.mark.parametrize("calibrator", CONTROLS)
@settings(max_examples=40)
@given(batches())
def test_failed_rollouts_change_nothing(calibrator: Calibrator, rollouts: list[Rollout]) -> None:
    batch = batch_of(*rollouts)
    kept = [row for row, included in enumerate(batch.included.tolist()) if included]
    assume(len(kept) > 1)
    groups = [batch.group_ids[row].item() for row in kept]
    assume(all(groups.count(group) > 1 for group in groups))  # a lone one would now be a group of one
    expected = turns(batch_of(*(rollouts[row] for row in kept)), calibrator)
    found = turns(batch, calibrator)
    assert [found[row] for row in kept] == [pytest.approx(values, abs=1e-6) for values in expected]


def test_the_order_is_drawn_from_seed_and_step() -> None:
    others = [rollout(search(name), search("a", name), answer("no"), sample=9) for name in "mnopqrs"]
    made = [replace(r, sample=n) for n, r in enumerate([GOOD, BAD, *others])]
    found = {
        str(turns(batch_of(*(replace(r, step=step) for r in made)), ShuffledPenalty(seed)))
        for seed in range(3)
        for step in range(3)
    }
    assert len(found) == 9
    batch = batch_of(*made)
    assert turns(batch, ShuffledPenalty(1)) == turns(batch, ShuffledPenalty(1))


@pytest.mark.parametrize("calibrator", CONTROLS)
def test_controls_do_not_write_into_what_they_are_given(calibrator: Calibrator) -> None:
    batch = batch_of(GOOD, BAD)
    advantages = GRPO().estimate(batch)
    before = advantages.clone(), batch.step_correctness.clone()
    calibrator.calibrate(batch, advantages)
    assert torch.equal(advantages, before[0])
    assert torch.equal(batch.step_correctness, before[1])


# What is refused.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConstantPenalty(1.5), r"correctness is 1.5; it must be a number from 0 to 1, or batch_mean"),
        (lambda: ConstantPenalty(math.nan), r"correctness is nan; it must be a number from 0 to 1"),
        (lambda: NegativeScale(-1.0), r"positive_weight is -1.0; it must be a number of at least 0"),
        (lambda: NegativeScale(1.0, math.inf), r"negative_weight is inf; it must be a number of at least 0"),
        (lambda: NegativeScale(0.0, 0.0), r"both 0; raise one, or nothing is trained"),
        (lambda: NegativeScale(1.0, 0.5, "calibadv"), r"negative_weight is 0.5, but match is calibadv, which sets it"),
        (lambda: NegativeScale(0.0, 1.0, "calibadv"), r"positive_weight is 0, but match is calibadv"),
        (lambda: NegativeClip(0.0), r"bound is 0.0; it must be a number above 0"),
        (lambda: NegativeClip(math.inf), r"bound is inf; it must be a number above 0"),
    ],
)
def test_values_that_make_no_sense(build: Callable[[], Calibrator], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("estimator", "calibrators", "message"),
    [
        (GRPO(), [SoftPenalty(), SoftPenalty()], "SoftPenalty is installed 2 times; keep one"),
        (GRPO(), [AnswerRebalance(), AnswerRebalance(1.5)], "AnswerRebalance is installed 2 times"),
        (GRPO(), [SoftPenalty(), ShuffledPenalty()], "SoftPenalty and ShuffledPenalty share a role"),
        (
            GRPO(),
            [ConstantPenalty(0.5), AnswerRebalance(), SoftPenalty()],
            "ConstantPenalty and SoftPenalty share a role",
        ),
        (
            GRPO(),
            [NegativeScale(match="calibadv"), AnswerRebalance()],
            r"NegativeScale and AnswerRebalance share .* \(answer balance\)",
        ),
        (
            GRPO(),
            [SoftPenalty(), NegativeScale(match="calibadv")],
            r"SoftPenalty and NegativeScale share a role \(search penalty\)",
        ),
        (
            GRPO(),
            [NegativeScale(match="calibadv"), NegativeClip()],
            r"NegativeScale and NegativeClip share a role \(negative clip\)",
        ),
        (MTGRPO(), [SoftPenalty()], "MTGRPO already gives credit by step correctness, and SoftPenalty would count it"),
        (MTGRPO(), [ShuffledPenalty()], "ShuffledPenalty would count it twice"),
        (MTGRPO(), [ConstantPenalty()], "ConstantPenalty would count it twice"),
        (MTGRPO(), [NegativeScale(match="calibadv")], "NegativeScale would count it twice"),
    ],
)
def test_combinations_that_make_no_sense(
    estimator: AdvantageEstimator, calibrators: list[Calibrator], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_combination(estimator, calibrators)


@pytest.mark.parametrize(
    ("estimator", "calibrators"),
    [
        (GRPO(), []),
        (GRPO(), [SoftPenalty(), AnswerRebalance()]),
        (GRPO(), [ShuffledPenalty(), AnswerRebalance()]),
        (GiGPO(), [SoftPenalty(), AnswerRebalance(), NegativeClip()]),
        (IGPO(), [SoftPenalty()]),
        (GRPO(), [NegativeScale(match="calibadv")]),
        (MTGRPO(), [AnswerRebalance(), ConstantPenalty(0.5), NegativeScale(0.1)]),
    ],
)
def test_combinations_that_are_methods(estimator: AdvantageEstimator, calibrators: list[Calibrator]) -> None:
    check_combination(estimator, calibrators)
