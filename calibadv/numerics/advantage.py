"""Group-relative advantages: one number per rollout, from its reward and those of its group.

A group of a single rollout has nothing to be compared with: its mean counts as 0 and its std as 1. A group that had
more, but of which fewer than two are included, is left out whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.numerics.masked import group_sum
from calibadv.numerics.shapes import check_shapes

EPSILON = 1e-6


def group_normalise(rewards: Tensor, group_ids: Tensor, included: Tensor) -> Tensor:
    """A_i = (R_i - mean) / (std + 1e-6) over the included rollouts of the group, std with n - 1.

    GRPO (arXiv 2402.03300). In a group of a single rollout A = R / (1 + 1e-6).

    Args:
        rewards: [B] score, gated by validity.
        group_ids: [B] group of each rollout, from 0.
        included: [B] bool, False for rollouts that are in no statistic.

    Returns:
        [B], exactly 0 for rollouts that are not included and for groups whose rewards are all equal.
    """
    return _or_alone(relative(rewards, group_ids, included), rewards / (1 + EPSILON), group_ids, included)


def group_centre(rewards: Tensor, group_ids: Tensor, included: Tensor) -> Tensor:
    """A_i = R_i - mean over the included rollouts of the group.

    Dr.GRPO (arXiv 2503.20783). In a group of a single rollout A = R.

    Args:
        rewards: [B] score, gated by validity.
        group_ids: [B] group of each rollout, from 0.
        included: [B] bool, False for rollouts that are in no statistic.

    Returns:
        [B], exactly 0 for rollouts that are not included and for groups whose rewards are all equal.
    """
    return _or_alone(relative(rewards, group_ids, included, by_std=False), rewards, group_ids, included)


def leave_one_out(rewards: Tensor, group_ids: Tensor, included: Tensor) -> Tensor:
    """A_i = R_i - mean of the other included rollouts of the group = n / (n - 1) x (R_i - mean of all n).

    RLOO (arXiv 2402.14740). In a group of a single rollout A = R.

    Args:
        rewards: [B] score, gated by validity.
        group_ids: [B] group of each rollout, from 0.
        included: [B] bool, False for rollouts that are in no statistic.

    Returns:
        [B], exactly 0 for rollouts that are not included and for groups whose rewards are all equal.
    """
    centred = relative(rewards, group_ids, included, by_std=False)
    left = group_sum(included, group_ids)[group_ids.cpu()]
    return _or_alone(centred * left / (left - 1).clamp(min=1), rewards, group_ids, included)


def relative(values: Tensor, set_ids: Tensor, counted: Tensor, by_std: bool = True) -> Tensor:
    """(value - mean) / (std + 1e-6) over the counted members of each set, std with n - 1; or value - mean alone.

    Args:
        values: [N].
        set_ids: [N] set of each value, from 0; not looked at where a value is not counted.
        counted: [N] bool.
        by_std: whether to divide.

    Returns:
        [N] float64, on the CPU; exactly 0 where a value is not counted, and in sets with fewer than two counted values
        or equal ones.
    """
    check_shapes("N, N, N", values, set_ids, counted)
    # float64: in float32 the mean of equal rewards can miss them by one bit, which the tiny epsilon blows up to 0.05.
    counts = counted.cpu()
    ids, numbers = torch.where(counts, set_ids.cpu(), 0), torch.where(counts, values.cpu().double(), 0.0)
    size = group_sum(counts, ids)
    mean = (group_sum(numbers, ids) / size.clamp(min=1))[ids]
    centred = torch.where(counts, numbers - mean, 0.0)
    if by_std:
        std = (group_sum(centred.square(), ids) / (size - 1).clamp(min=1)).sqrt()[ids]
        centred = centred / (std + EPSILON)
    return torch.where(counts & (size >= 2)[ids] & ~_tied(numbers, ids, counts), centred, 0.0)


def alone(group_ids: Tensor) -> Tensor:
    """Which rollouts are the only one of their group, not counting in which are included.

    Args:
        group_ids: [B] group of each rollout, from 0.

    Returns:
        [B] bool, on the CPU.
    """
    ids = group_ids.cpu()
    return (torch.bincount(ids) == 1)[ids]


def _or_alone(compared: Tensor, lone: Tensor, group_ids: Tensor, included: Tensor) -> Tensor:
    """What a comparison gives, or, for an included rollout of a group of one, what stands for it; as ``lone`` is."""
    check_shapes("B, B, B, B", compared, lone, group_ids, included)
    return torch.where(alone(group_ids) & included.cpu(), lone.cpu().double(), compared).to(lone)


def _tied(values: Tensor, group_ids: Tensor, included: Tensor) -> Tensor:
    """[B] whether all included values of the row's group are equal."""
    start = torch.zeros(int(group_ids.max()) + 1, dtype=values.dtype)
    highest = start.scatter_reduce(0, group_ids[included], values[included], "amax", include_self=False)
    lowest = start.scatter_reduce(0, group_ids[included], values[included], "amin", include_self=False)
    return (highest == lowest)[group_ids]
