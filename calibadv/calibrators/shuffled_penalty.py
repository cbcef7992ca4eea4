"""The sharpest control of SoftPenalty: the same correctness values at random turns."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.calibrators._penalty import NegativeTurns, apply_soft_penalty, find_negative_turns
from calibadv.interfaces import Calibrator
from calibadv.numerics.rng import keyed_uniforms
from calibadv.types import DrawKey, Metrics


class ShuffledPenalty(Calibrator):
    """SoftPenalty with the step correctness shuffled among the penalized search turns of the batch: its control.

    The values are exactly those of SoftPenalty, so their distribution and number are the same in every step, and the
    answer turns keep their advantages; which turn found evidence, and in which group, is gone. What SoftPenalty gains
    beyond this control is due to the evidence. The order is drawn from the seed and the rollout step, and does not
    depend on the order of the rollouts in the batch.

    Args:
        seed: Of the order. It does not follow the seed of the run, whose rollouts are others anyway.
    """

    uses_step_correctness = True
    roles = frozenset({"search penalty"})

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @override
    def calibrate(self, batch: RolloutBatch, advantages: Tensor) -> tuple[Tensor, Metrics]:
        negative = find_negative_turns(batch, advantages)
        return apply_soft_penalty(advantages, self.shuffled_correctness(batch, negative), negative)

    def shuffled_correctness(self, batch: RolloutBatch, negative: NegativeTurns) -> Tensor:
        """Permute the step correctness of the search turns with a negative advantage; the others keep theirs."""
        turns: list[tuple[int, int]] = [(row, turn) for row, turn in negative.searches.nonzero().tolist()]
        turns.sort(key=lambda turn: (batch.rollouts[turn[0]].question.id, batch.rollouts[turn[0]].sample, turn[1]))
        rows, columns = [row for row, _ in turns], [turn for _, turn in turns]
        draws = keyed_uniforms(DrawKey(self.seed, batch.rollouts[0].step, "shuffled-penalty", 0, 0), len(turns))
        correctness = batch.step_correctness.clone()
        order = torch.from_numpy(np.argsort(draws, kind="stable"))
        correctness[rows, columns] = correctness[rows, columns][order]
        return correctness
