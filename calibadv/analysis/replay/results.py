"""What a comparison of methods on the same rollouts says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Masses = dict[str, dict[str, float | None]]
KINDS = ("search", "answer")
SIDES = ("positive", "negative")


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """What one method does.

    Attributes:
        name: of the arm.
        estimated: by ``search`` and ``answer``: ``positive_mass`` and ``negative_mass``, the sum of the absolute
            advantages of that sign over the tokens of such turns, per rollout, before the calibrators; and ``ratio``,
            positive over negative, None where the latter is 0.
        calibrated: the same after the calibrators.
        punished_turns: search turns whose estimated advantage is negative.
        softened_turns: those among them that the calibrators made less negative.
        zeroed_groups: groups that teach nothing, since every advantage in them is 0 after the calibrators.
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
    """A turn that two methods see differently.

    Attributes:
        file: where its rollout stands.
        step: of the rollout.
        question_id: of the rollout.
        question: its text.
        sample: of the rollout.
        turn: from 0.
        kind: an answer turn is the last of its rollout.
        tokens: of the policy's message.
        text: of the policy's message.
        advantages: under the first method and under the second, means over the tokens.
        difference: between these, after the second was multiplied by ``scale``, times the tokens.
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
    """How far two methods are apart.

    Attributes:
        arms: their names.
        scale: mass of the first method's estimator over that of the second's. Advantages of the second are multiplied
            by it before they are compared, so that an estimator is not taken for another one because its numbers are
            larger; between methods of one estimator it is 1.
        mass: sum of the differences of all turns, per rollout.
        turns: those that differ most; where they differ alike, in the order of the files.
    """

    arms: tuple[str, str]
    scale: float
    mass: float
    turns: list[DisputedTurn]


@dataclass(frozen=True, slots=True)
class Figures:
    """A comparison.

    Attributes:
        files: that were read.
        batches: steps of a file.
        groups: with a trained rollout.
        lone_groups: those of a single rollout, as in files of validation, which methods compare with nothing.
        rollouts: all of them.
        trained_rollouts: all but those whose search failed, and what that left alone in its group.
        arms: one entry per method.
        disagreements: of the first method with each other one.
    """

    files: list[str]
    batches: int
    groups: int
    lone_groups: int
    rollouts: int
    trained_rollouts: int
    arms: list[ArmFigures]
    disagreements: list[Disagreement]
