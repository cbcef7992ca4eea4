"""REINFORCE with the other rollouts as baseline."""

from __future__ import annotations

from torch import Tensor

from calibadv.batch import RolloutBatch
from calibadv.estimators._broadcast import of_rollouts
from calibadv.interfaces import AdvantageEstimator
from calibadv.numerics.advantages import leave_one_out


class RLOO(AdvantageEstimator):
    """Reward minus the mean reward of the group's other rollouts (arXiv 2402.14740).

    This is G / (G - 1) times Dr.GRPO's advantage, and, unlike it, unbiased.
    """

    def estimate(self, batch: RolloutBatch) -> Tensor:
        """Give every policy token of a rollout what the rollout earned above the others.

        Args:
            batch: B rollouts with rewards.

        Returns:
            [B, T], 0 outside ``batch.loss_mask``.
        """
        return of_rollouts(leave_one_out(batch.rewards, batch.group_ids, batch.included), batch)
