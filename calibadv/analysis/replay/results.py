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

    Attributes:
        name: of the arm.
        estimated: by ``search`` and ``answer``: ``positive_mass`` and ``negative_mass``, the sum of the absolute
            advantages of that sign over the tokens of such turns, per rollout, before the calibrators; and ``ratio``,
            positive over negative, None where the latter is 0.
        calibrated: the same after the calibrators.
        punished_turns: search turns whose estimated advantage is negative.
        softened_turns: those among them that the calibrators made less negative.
        zeroed_groups: groups without a gradient, since every advantage in them is 0 after the calibrators.
        tied_groups: groups of at least two trained rollouts whose rewards are all equal.
    """

    name: str
    estimated: Masses
    calibrated: Masses
    punished_turns: int
    softened_turns: int
    zeroed_groups: int
    tied_groups: int


@dataclass(frozen=True, slots=True)
class DisputedTurn:
    """A turn to which two methods give different advantages.

    Attributes:
        file: of the rollout.
        step: of the rollout.
        question_id: of the rollout.
        question: its text.
        sample: of the rollout.
        turn: from 0.
        kind: an answer turn is the last of its rollout.
        tokens: of the policy's message.
        text: of the policy's message.
        advantages: under the first method and under the second, means over the tokens.
        difference: absolute difference of these, the second one multiplied by ``scale``, times the tokens.
    """

    file: str
    step: int
    question_id: str
    question: str
    sample: int
    turn: int
    kind: Literal["search", "answer"]
    tokens: int
    text: str
    advantages: tuple[float, float]
    difference: float


@dataclass(frozen=True, slots=True)
class Disagreement:
    """The difference between two methods.

    Attributes:
        arms: their names.
        scale: mass of the first method's estimator over that of the second's. Advantages of the second are multiplied
            by it before they are compared, so that estimators that differ only in scale do not differ; between methods
            of one estimator it is 1.
        mass: sum of the differences of all turns, per rollout.
        turns: those that differ most; with equal differences in the order of the files.
    """

    arms: tuple[str, str]
    scale: float
    mass: float
    turns: list[DisputedTurn]


@dataclass(frozen=True, slots=True)
class ReplayResults:
    """A comparison of methods.

    Attributes:
        files: that were read.
        batches: steps of a file.
        groups: with a trained rollout.
        lone_groups: groups of a single rollout, as in files of validation, which have no group to compare with.
        rollouts: all of them.
        trained_rollouts: without those whose search failed, and those that this leaves alone in their group.
        arms: one entry per method.
        disagreements: of the first method with each other one.
    """

    files: list[str]
    batches: int
    groups: int
    lone_groups: int
    rollouts: int
    trained_rollouts: int
    arms: list[ArmResults]
    disagreements: list[Disagreement]
