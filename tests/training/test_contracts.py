"""Parts that break the contract of their seam are refused by name, where they are called."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.agents import episode
from support.records import answer, rollout, search
from torch import Tensor

from calibadv.analysis.replay.method import Method, apply_method
from calibadv.batch import LossInputs, RolloutBatch, collate
from calibadv.calibrators import SoftPenalty
from calibadv.errors import UserError
from calibadv.estimators import GRPO
from calibadv.interfaces import AdvantageEstimator, Calibrator, GroupFilter, PolicyLoss, Regularizer
from calibadv.losses import PPOClip
from calibadv.rewards import F1
from calibadv.training.advantages import compute_advantages
from calibadv.training.objective import Objective
from calibadv.training.sampling import refill
from calibadv.types import Metrics, Rollout

Make = Callable[[RolloutBatch], Any]


class Estimates(AdvantageEstimator):
    """Return what a test makes."""

    def __init__(self, make: Make) -> None:
        self.make = make

    def estimate(self, batch: RolloutBatch) -> Tensor:
        return self.make(batch)  # type: ignore[no-any-return]


class Calibrates(Calibrator):
    """Return what a test makes."""

    def __init__(self, make: Make) -> None:
        self.make = make

    def calibrate(self, batch: RolloutBatch, advantages: Tensor) -> tuple[Tensor, Metrics]:
        return self.make(batch)  # type: ignore[no-any-return]


def batch() -> RolloutBatch:
    """Prompt 0 and messages 1 0 and 0, the second shorter by a token."""
    return collate([episode((0,), (1, 0), question="first", score=1.0), episode((0,), (0,), question="second")])


def one_wrong(value: float) -> Make:
    """A number at the last trained token of the second rollout."""

    def make(batch: RolloutBatch) -> Tensor:
        advantages = batch.loss_mask.float()
        advantages[1, 1] = value
        return advantages

    return make


BAD_ADVANTAGES: list[tuple[Make, str]] = [
    (lambda batch: None, r"returned None; advantages are a tensor \[B, T\]"),
    (lambda batch: [[0.0]], r"returned list \[\[0.0\]\]; advantages are a tensor"),
    (lambda batch: batch.rewards, r"of shape \[2\]; they are \[B, T\], here \[2, 3\]"),
    (one_wrong(math.nan), "returned an advantage of nan for question 'second'; all must be finite"),
    (one_wrong(-math.inf), "returned an advantage of -inf for question 'second'"),
    (lambda batch: torch.ones(2, 3), r"other than 0 for 3 tokens outside of batch\.loss_mask; multiply by it"),
]


@pytest.mark.parametrize(("make", "message"), BAD_ADVANTAGES)
def test_advantages_that_are_none(make: Make, message: str) -> None:
    with pytest.raises(UserError, match=f"^Estimates .*{message}"):
        compute_advantages(batch(), Estimates(make), ())
    with pytest.raises(UserError, match=f"^Calibrates .*{message}"):
        compute_advantages(batch(), GRPO(), (SoftPenalty(), Calibrates(lambda batch: (make(batch), {}))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        # A tensor of two rows would fall apart into "advantages" and "metrics".
        (
            lambda batch: batch.loss_mask.float(),
            "returned Tensor tensor.*; it returns a tensor and a dictionary of met",
        ),
        (lambda batch: (batch.loss_mask.float(), None), "returned tuple .*; it returns a tensor and a dictionary"),
        (
            lambda batch: (batch.loss_mask.float(), {"x": torch.ones(())}),
            r"reported Tensor tensor\(1\.\) as 'x'; a metric",
        ),
        (lambda batch: (batch.loss_mask.float(), {"x": "much"}), "reported str 'much' as 'x'; a metric is a number"),
    ],
)
def test_a_calibrator_returns_advantages_and_numbers(make: Make, message: str) -> None:
    with pytest.raises(UserError, match=f"^Calibrates {message}"):
        compute_advantages(batch(), GRPO(), [Calibrates(make)])


def test_what_is_right_goes_through() -> None:
    given = batch()
    estimated, calibrated, metrics = compute_advantages(
        given,
        Estimates(lambda batch: batch.loss_mask * 2.0),
        [Calibrates(lambda batch: (batch.loss_mask * -1.0, {"a": np.float32(1), "b": True}))],
    )
    assert torch.equal(estimated, given.loss_mask * 2.0)
    assert torch.equal(calibrated, given.loss_mask * -1.0)
    assert metrics == {"a": 1, "b": True}


def test_replay_refuses_the_same() -> None:
    method = Method(F1(), Estimates(lambda batch: batch.rewards), [])
    with pytest.raises(UserError, match=r"^Estimates returned advantages of shape \[1\]"):
        apply_method([rollout(search("a"), answer("gold"))], method)


# Terms of the loss.


class Loss(PolicyLoss):
    """Return what a test says."""

    def __init__(self, returned: Any) -> None:
        self.returned = returned

    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        return self.returned  # type: ignore[no-any-return]


class Term(Regularizer):
    """Return what a test says."""

    def __init__(self, returned: Any) -> None:
        self.returned = returned

    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        return self.returned  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ((torch.zeros(2), {}), r"returned a tensor of shape \[2\] as its term of the loss, which is a scalar tensor"),
        ((0.5, {}), "returned 0.5 as its term of the loss, which is a scalar tensor"),
        (torch.zeros(()), "returned Tensor tensor.*; it returns a tensor and a dictionary of metrics"),
        ((torch.zeros(()), {"x": None}), "reported None as 'x'; a metric is a number"),
    ],
)
def test_terms_of_the_loss_that_are_none(returned: Any, message: str) -> None:
    places = torch.zeros(1, dtype=torch.int64)
    inputs = LossInputs(torch.zeros(1), torch.zeros(1), None, torch.ones(1), 1.0, places, places, 1)
    with pytest.raises(UserError, match=f"^Loss {message}"):
        Objective(Loss(returned), 0.0, ()).compute(inputs)
    with pytest.raises(UserError, match=f"^Term {message}"):
        Objective(PPOClip(), 0.0, (Term(returned),)).compute(inputs)


# Filters.


class Filter(GroupFilter):
    """Return what a test says."""

    max_tries = 0

    def __init__(self, verdict: Any) -> None:
        self.verdict = verdict

    def keep(self, group: Sequence[Rollout]) -> bool:
        return self.verdict  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("verdict", "shown"), [(None, "None"), (0.3, "0.3"), ("no", "str 'no'"), (torch.tensor(True), "Tensor tensor")]
)
def test_a_filter_says_yes_or_no(verdict: Any, shown: str) -> None:
    group = [rollout(search("a"), answer("gold"))]
    with pytest.raises(
        UserError, match=rf"^Filter returned {shown}.* for the group of question 'q'; keep returns True"
    ):
        refill([group], Filter(verdict), iter(()), lambda asked: [])


@pytest.mark.parametrize("verdict", [True, np.bool_(True), np.bool_(False)])
def test_truth_values_of_numpy_do(verdict: Any) -> None:
    group = [rollout(search("a"), answer("gold"))]
    _, metrics = refill([group], Filter(verdict), iter(()), lambda asked: [])
    assert metrics["filter/unreplaced"] == (0 if verdict else 1)
