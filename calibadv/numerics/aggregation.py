"""From one number per token to the part of a mini-batch's loss that a micro-batch contributes."""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.numerics.masked import check_shapes


def token_mean(values: Tensor, num_tokens: float) -> Tensor:
    """Sum over the tokens / trained tokens of the mini-batch: every token weighs the same.

    Args:
        values: [N].
        num_tokens: trained tokens of the whole mini-batch.

    Returns:
        A scalar.
    """
    check_shapes("N", values)
    return values.sum() / num_tokens


def sequence_mean(values: Tensor, rollout_ids: Tensor, num_rollouts: int) -> Tensor:
    """Mean over the tokens of each rollout, then over the rollouts of the mini-batch (GRPO, arXiv 2402.03300).

    Args:
        values: [N]; with all trained tokens of a rollout, or none.
        rollout_ids: [N] rollout of each token; equal numbers are one rollout.
        num_rollouts: rollouts with a trained token in the whole mini-batch.

    Returns:
        A scalar.
    """
    check_shapes("N, N", values, rollout_ids)
    lengths = torch.bincount(rollout_ids)[rollout_ids]
    return (values / lengths).sum() / num_rollouts


def fixed_length(values: Tensor, num_rollouts: int, length: int) -> Tensor:
    """Sum over the tokens / (length x rollouts of the mini-batch): Dr.GRPO (arXiv 2503.20783).

    As in a mean over tokens every token weighs the same, but here how much does not depend on the lengths that happened
    to be sampled into the mini-batch.

    Args:
        values: [N].
        num_rollouts: rollouts with a trained token in the whole mini-batch.
        length: tokens that every rollout counts for.

    Returns:
        A scalar.
    """
    check_shapes("N", values)
    return values.sum() / (length * num_rollouts)
