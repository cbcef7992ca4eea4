"""Group-relative policy optimization."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.estimators._broadcast import broadcast_rollout_values
from calibadv.interfaces import AdvantageEstimator
from calibadv.numerics.advantages import group_normalise


class GRPO(AdvantageEstimator):
    """Reward minus the group's mean, over the group's standard deviation (arXiv 2402.03300)."""

    @override
    def estimate(self, batch: RolloutBatch) -> Tensor:
        return broadcast_rollout_values(group_normalise(batch.rewards, batch.group_ids, batch.included), batch)
