"""Broadcast values of rollouts and turns to their trained tokens."""

from __future__ import annotations

from torch import Tensor

from calibadv.batch import RolloutBatch
from calibadv.numerics.advantages import spread_over_tokens


def broadcast_rollout_values(advantages: Tensor, batch: RolloutBatch) -> Tensor:
    """Give every trained token the value [B] of its rollout: [B, T]."""
    return advantages.to(batch.rewards)[:, None] * batch.loss_mask


def broadcast_turn_values(advantages: Tensor, batch: RolloutBatch) -> Tensor:
    """Give every trained token the value [B, K] of its turn: [B, T]."""
    return spread_over_tokens(advantages.to(batch.rewards), batch.turn_ids) * batch.loss_mask
