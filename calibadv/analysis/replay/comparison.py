"""Comparison of the advantages that several methods give to the same rollouts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibadv.analysis.replay.method import ReplayedBatch
from calibadv.analysis.replay.recording import RecordedRollouts
from calibadv.analysis.replay.results import (
    SIGNS,
    TURN_KINDS,
    ArmResults,
    Disagreement,
    DisputedTurn,
    Masses,
    ReplayResults,
)
from calibadv.batch import RolloutBatch, group_rollouts, turn_values
from calibadv.numerics.credit import penalized_search_turns
from calibadv.numerics.masked import turn_means
from calibadv.training.metrics import advantage_metrics

# Advantages are float32, and scaled: smaller differences per token are rounding errors.
_TOLERANCE = 1e-5


@dataclass
class _Totals:
    """Sums over the batches of one arm."""

    masses: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    advantages: list[float] = field(default_factory=list)
    punished: int = 0
    softened: int = 0
    zeroed: int = 0
    tied: int = 0

    def add(self, replayed: ReplayedBatch, groups: Sequence[Sequence[int]]) -> None:
        """Add a batch; ``groups`` are the rows of its trained rollouts, by group."""
        batch = replayed.batch
        for stage, advantages in (("estimated", replayed.estimated), ("calibrated", replayed.calibrated)):
            for name, value in advantage_metrics(batch, advantages, stage).items():
                self.masses[name] += value * len(batch.rollouts)
        num_turns = batch.step_correctness.shape[1]
        before = turn_means(replayed.estimated, batch.turn_ids, num_turns)
        after = turn_means(replayed.calibrated, batch.turn_ids, num_turns)
        punished = penalized_search_turns(before, batch.answer_turn)
        self.punished += int(punished.sum())
        self.softened += int((punished & (after > before)).sum())
        for rows in groups:
            self.zeroed += not replayed.calibrated[rows].any()
            self.tied += len(rows) > 1 and len({batch.rollouts[row].score for row in rows}) == 1
        self.advantages += [value for values in turn_values(batch, replayed.calibrated) for value in values or ()]

    def mass(self, stage: str, kind: str, side: str) -> float:
        """Sum of the absolute advantages over the tokens of turns of one kind and sign."""
        return self.masses[f"advantage/{stage}/{kind}/{side}_mass"]

    @property
    def estimated_mass(self) -> float:
        """Sum of all absolute advantages of the estimator."""
        return sum(self.mass("estimated", kind, side) for kind in TURN_KINDS for side in SIGNS)


class Comparison:
    """Accumulates the results of several methods, at least one, batch by batch."""

    def __init__(self, arms: Sequence[str], recorded: RecordedRollouts) -> None:
        self._recorded = recorded
        self._totals = {arm: _Totals() for arm in arms}
        self._turns: list[tuple[int, int]] = []
        self._batches = self._groups = self._lone = self._trained = 0

    def add(self, rows: Sequence[int], replayed: Mapping[str, ReplayedBatch]) -> None:
        """Add one batch: its rows in the recording, and its results by the name of the arm."""
        batch = next(iter(replayed.values())).batch
        groups = _trained_groups(batch)
        self._batches += 1
        self._groups += len(groups)
        self._lone += sum(len(rows) == 1 for rows in group_rollouts(batch.rollouts))
        self._trained += sum(map(len, groups))
        for name, arm_batch in replayed.items():
            self._totals[name].add(arm_batch, groups)
        last = batch.answer_turn.tolist()
        trained = [index for index, included in enumerate(batch.included.tolist()) if included]
        self._turns += [(rows[index], turn) for index in trained for turn in range(last[index] + 1)]

    def results(self, top: int) -> ReplayResults:
        """The results over all batches so far, at least one, with the ``top`` turns that differ most."""
        first, *others = self._totals
        return ReplayResults(
            files=list(dict.fromkeys(map(str, self._recorded.files))),
            batches=self._batches,
            groups=self._groups,
            lone_groups=self._lone,
            rollouts=self._rollouts,
            trained_rollouts=self._trained,
            arms=[self._arm(name, totals) for name, totals in self._totals.items()],
            disagreements=[self._disagreement(first, other, top) for other in others],
        )

    @property
    def _rollouts(self) -> int:
        return len(self._recorded.rollouts)

    def _arm(self, name: str, totals: _Totals) -> ArmResults:
        return ArmResults(
            name=name,
            estimated=self._masses(totals, "estimated"),
            calibrated=self._masses(totals, "calibrated"),
            punished_turns=totals.punished,
            softened_turns=totals.softened,
            zeroed_groups=totals.zeroed,
            tied_groups=totals.tied,
        )

    def _masses(self, totals: _Totals, stage: str) -> Masses:
        masses: Masses = {}
        for kind in TURN_KINDS:
            positive, negative = (totals.mass(stage, kind, side) for side in SIGNS)
            masses[kind] = {
                "positive_mass": positive / self._rollouts,
                "negative_mass": negative / self._rollouts,
                "ratio": positive / negative if negative else None,
            }
        return masses

    def _disagreement(self, first: str, second: str, top: int) -> Disagreement:
        one, other = self._totals[first], self._totals[second]
        sizes = one.estimated_mass, other.estimated_mass
        scale = sizes[0] / sizes[1] if all(sizes) else 1.0
        gaps = np.abs(np.array(one.advantages) - scale * np.array(other.advantages))
        tokens = [self._recorded.rollouts[row].policy_segments[turn].num_tokens for row, turn in self._turns]
        differences = np.where(gaps > _TOLERANCE, gaps, 0.0) * np.array(tokens)
        most = [index for index in np.argsort(-differences, kind="stable")[:top].tolist() if differences[index] > 0]
        turns = [
            self._disputed(index, (one.advantages[index], other.advantages[index]), float(differences[index]))
            for index in most
        ]
        return Disagreement((first, second), scale, float(differences.sum()) / self._rollouts, turns)

    def _disputed(self, index: int, advantages: tuple[float, float], difference: float) -> DisputedTurn:
        row, turn = self._turns[index]
        rollout = self._recorded.rollouts[row]
        messages = rollout.policy_segments
        return DisputedTurn(
            file=str(self._recorded.files[row]),
            step=rollout.step,
            question_id=rollout.question.id,
            question=rollout.question.question,
            sample=rollout.sample,
            turn=turn,
            kind="answer" if turn == len(messages) - 1 else "search",
            tokens=messages[turn].num_tokens,
            text=messages[turn].text,
            advantages=advantages,
            difference=difference,
        )


def _trained_groups(batch: RolloutBatch) -> list[list[int]]:
    """Rows of the trained rollouts of each group that has any."""
    included = batch.included.tolist()
    trained = [[row for row in rows if included[row]] for rows in group_rollouts(batch.rollouts)]
    return [rows for rows in trained if rows]
