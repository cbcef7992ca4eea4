"""REINFORCE with the other rollouts as baseline."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.estimators._broadcast import broadcast_rollout_values
from calibadv.interfaces import AdvantageEstimator
from calibadv.numerics.advantages import leave_one_out


class RLOO(AdvantageEstimator):
    """Reward minus the mean reward of the group's other rollouts (arXiv 2402.14740).

    This is G / (G - 1) times Dr.GRPO's advantage, and, unlike it, unbiased.
    """

    @override
    def estimate(self, batch: RolloutBatch) -> Tensor:
        return broadcast_rollout_values(leave_one_out(batch.rewards, batch.group_ids, batch.included), batch)
