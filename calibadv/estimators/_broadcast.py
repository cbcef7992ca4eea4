"""From advantages of rollouts and turns to those of tokens."""

from __future__ import annotations

from torch import Tensor

from calibadv.batch import RolloutBatch
from calibadv.numerics.advantages import spread_over_tokens


def of_rollouts(advantages: Tensor, batch: RolloutBatch) -> Tensor:
    """Give every trained token the advantage of its rollout."""
    return advantages.to(batch.rewards)[:, None] * batch.loss_mask


def of_turns(advantages: Tensor, batch: RolloutBatch) -> Tensor:
    """Give every trained token the advantage of its turn."""
    return spread_over_tokens(advantages.to(batch.rewards), batch.turn_ids) * batch.loss_mask
