"""Records of a comparison of methods on the same rollouts; ``calibadv replay --json`` prints them by these names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Masses = dict[str, dict[str, float | None]]
TURN_KINDS = ("search", "answer")
SIGNS = ("positive", "negative")


@dataclass(frozen=True, slots=True)
class ArmResults:
    """The effect of one method.

    Masses are by ``search`` and ``answer``: ``positive_mass`` and ``negative_mass``, the sum of the absolute advantages
    of that sign over the tokens of such turns, per rollout; and ``ratio``, positive over negative, None where the
    latter is 0.
    """

    name: str
    estimated: Masses  # before the calibrators
    calibrated: Masses  # after the calibrators
    punished_turns: int  # search turns whose estimated advantage is negative
    softened_turns: int  # those among them that the calibrators made less negative
    zeroed_groups: int  # groups without a gradient, since every advantage in them is 0 after the calibrators
    tied_groups: int  # groups of at least two trained rollouts whose rewards are all equal


@dataclass(frozen=True, slots=True)
class DisputedTurn:
    """A turn to which two methods give different advantages, with the policy's message."""

    file: str
    step: int
    question_id: str
    question: str
    sample: int
    turn: int  # from 0
    kind: Literal["search", "answer"]  # an answer turn is the last of its rollout
    tokens: int
    text: str
    advantages: tuple[float, float]  # under both methods, means over the tokens
    difference: float  # absolute difference, the second one multiplied by scale, times the tokens


@dataclass(frozen=True, slots=True)
class Disagreement:
    """The difference between two methods.

    ``scale`` is the mass of the first method's estimator over that of the second's. Advantages of the second are
    multiplied by it before they are compared, so that estimators that differ only in scale do not differ; between
    methods of one estimator it is 1.
    """

    arms: tuple[str, str]
    scale: float
    mass: float  # sum of the differences of all turns, per rollout
    turns: list[DisputedTurn]  # those that differ most; with equal differences in the order of the files


@dataclass(frozen=True, slots=True)
class ReplayResults:
    """A comparison of methods."""

    files: list[str]
    batches: int  # steps of a file
    groups: int  # with a trained rollout
    lone_groups: int  # of a single rollout, as in files of validation, which have no group to compare with
    rollouts: int
    trained_rollouts: int  # without those whose search failed, and those that this leaves alone in their group
    arms: list[ArmResults]
    disagreements: list[Disagreement]  # of the first method with each other one
