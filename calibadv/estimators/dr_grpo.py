"""GRPO without its two normalisations: this file drops the first."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.estimators._broadcast import broadcast_rollout_values
from calibadv.interfaces import AdvantageEstimator
from calibadv.numerics.advantages import group_centre


class DrGRPO(AdvantageEstimator):
    """Reward minus the group's mean: Dr.GRPO (arXiv 2503.20783).

    GRPO divides by the group's standard deviation, which gives much weight to questions that are nearly always or
    nearly never answered. Dr.GRPO also divides the loss by a constant length, which is a setting of the loss.
    """

    @override
    def estimate(self, batch: RolloutBatch) -> Tensor:
        return broadcast_rollout_values(group_centre(batch.rewards, batch.group_ids, batch.included), batch)
