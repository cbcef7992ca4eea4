"""Soften the penalty of searches that found evidence."""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.interfaces import Calibrator, Metrics
from calibadv.numerics.credit import punished_tokens, soften
from calibadv.types import RolloutBatch


class SoftPenalty(Calibrator):
    """In rollouts with a negative advantage, multiply that of search turn t by (1 - step correctness of t).

    The first part of CalibAdv (arXiv 2604.18235). The answer turn keeps its advantage.
    """

    def calibrate(self, batch: RolloutBatch, advantages: Tensor) -> tuple[Tensor, Metrics]:
        """Apply ``calibadv.numerics.credit.soft_penalty``.

        Args:
            batch: B rollouts with step correctness.
            advantages: [B, T], 0 outside ``batch.loss_mask``.

        Returns:
            [B, T]; and ``credit/softened``, the share of the punished search turns whose penalty shrank (left out
            where no search turn is punished).
        """
        num_turns = batch.step_correctness.shape[1]
        places, turns = punished_tokens(advantages, batch.turn_ids, num_turns)
        softened = soften(advantages, batch.step_correctness, places, turns)
        punished = torch.bincount(turns, minlength=batch.step_correctness.numel()).view(-1, num_turns) > 0
        punished &= torch.arange(num_turns, device=advantages.device) < batch.answer_turn[:, None]
        count = int(punished.sum())
        if count == 0:
            return softened, {}
        return softened, {"credit/softened": int((punished & (batch.step_correctness > 0)).sum()) / count}
