"""Group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.numerics.masked import group_sum
from calibadv.numerics.shapes import check_shapes

EPSILON = 1e-6


def group_normalise(rewards: Tensor, group_ids: Tensor, included: Tensor) -> Tensor:
    """A_i = (R_i - mean) / (std + 1e-6) over the included rollouts of the group, std with n - 1.

    GRPO (arXiv 2402.03300). A group that consists of a single rollout has mean 0 and std 1, so A = R / (1 + 1e-6). A
    group that had more, but of which fewer than two are included, is left out whole.

    Args:
        rewards: [B] score, gated by validity.
        group_ids: [B] group of each rollout, from 0.
        included: [B] bool, False for rollouts that are in no statistic.

    Returns:
        [B], exactly 0 for rollouts that are not included and for groups whose rewards are all equal.
    """
    check_shapes("B, B, B", rewards, group_ids, included)
    # float64: in float32 the mean of equal rewards can miss them by one bit, which the tiny epsilon blows up to 0.05.
    ids, counts = group_ids.cpu(), included.cpu()
    values = torch.where(counts, rewards.cpu().double(), 0.0)
    members, left = torch.bincount(ids), group_sum(counts, ids)
    mean = (group_sum(values, ids) / left.clamp(min=1))[ids]
    centred = torch.where(counts, values - mean, 0.0)
    std = (group_sum(centred.square(), ids) / (left - 1).clamp(min=1)).sqrt()[ids]

    alone = (members == 1)[ids]
    usable = (left >= 2)[ids] & ~_tied(values, ids, counts)
    normalised = torch.where(alone, values / (1 + EPSILON), centred / (std + EPSILON))
    return torch.where(counts & (usable | alone), normalised, 0.0).to(rewards)


def _tied(values: Tensor, group_ids: Tensor, included: Tensor) -> Tensor:
    """[B] whether all included values of the row's group are equal."""
    start = torch.zeros(int(group_ids.max()) + 1, dtype=values.dtype)
    highest = start.scatter_reduce(0, group_ids[included], values[included], "amax", include_self=False)
    lowest = start.scatter_reduce(0, group_ids[included], values[included], "amin", include_self=False)
    return (highest == lowest)[group_ids]
