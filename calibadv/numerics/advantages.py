"""Group-relative advantages: of rollouts, from their rewards, and of turns, from the rewards of turns.

In a group of a single rollout the mean counts as 0 and the std as 1. A group that had more, but of which fewer than two
are included, is left out whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.numerics.masked import check_shapes, group_sum

_EPSILON = 1e-6


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
    standardized = _standardize_within(rewards, group_ids, included)
    return _with_singletons(standardized, rewards / (1 + _EPSILON), group_ids, included)


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
    centred = _standardize_within(rewards, group_ids, included, by_std=False)
    return _with_singletons(centred, rewards, group_ids, included)


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
    centred = _standardize_within(rewards, group_ids, included, by_std=False)
    left = group_sum(included, group_ids)[group_ids.cpu()]
    return _with_singletons(centred * left / (left - 1).clamp(min=1), rewards, group_ids, included)


def per_turn_group_advantages(turn_rewards: Tensor, answer_turn: Tensor, group_ids: Tensor, included: Tensor) -> Tensor:
    """Normalise the rewards of search turns over the group, per turn index: the turn part of MT-GRPO (2505.11821).

    Args:
        turn_rewards: [B, K] reward of each search turn.
        answer_turn: [B] index of the answer turn.
        group_ids: [B] group of each rollout, from 0.
        included: [B] bool, False for rollouts that are in no statistic.

    Returns:
        [B, K]; 0 for what is no search turn, where all rewards are equal, and where no other rollout of the group has a
        search turn of that index.
    """
    check_shapes("B K, B, B, B", turn_rewards, answer_turn, group_ids, included)
    turns = torch.arange(turn_rewards.shape[1])
    searches = (turns < answer_turn.cpu()[:, None]) & included.cpu()[:, None]
    return _standardize_within(turn_rewards, group_ids.cpu()[:, None] * len(turns) + turns, searches)


def anchor_advantages(
    rewards: Tensor, answer_turn: Tensor, group_ids: Tensor, anchor_ids: Tensor, gamma: float, by_std: bool
) -> Tensor:
    """Normalise gamma^(T - t) R over the turns that start from one state: the step part of GiGPO (2505.10978).

    Args:
        rewards: [B] score, gated by validity.
        answer_turn: [B] index T of the answer turn.
        group_ids: [B] group of each rollout, from 0.
        anchor_ids: [B, K] equal within a group where two turns started from the same state; -1 for none.
        gamma: discount per turn.
        by_std: whether to divide by the std of the step group.

    Returns:
        [B, K]; 0 in step groups of one turn and where all returns are equal.
    """
    check_shapes("B, B, B, B K", rewards, answer_turn, group_ids, anchor_ids)
    anchors = anchor_ids.cpu()
    left = (answer_turn.cpu()[:, None] - torch.arange(anchors.shape[1])).clamp(min=0)
    returns = rewards.cpu().double()[:, None] * gamma ** left.double()
    step_groups = group_ids.cpu()[:, None] * (int(anchors.max()) + 1) + anchors
    return _standardize_within(returns, step_groups, anchors >= 0, by_std)


def gain_rewards(
    turn_gains: Tensor, rewards: Tensor, answer_turn: Tensor, group_ids: Tensor, included: Tensor, joint: bool
) -> Tensor:
    """Normalise the gains of the search turns and the rewards of the answers over the group, as IGPO (2510.14967) does.

    In a group of a single rollout the mean counts as 0 and the std as 1, as in GRPO.

    Args:
        turn_gains: [B, K] gain of each search turn.
        rewards: [B] score, gated by validity: the reward of the answer turn.
        answer_turn: [B] index of the answer turn.
        group_ids: [B] group of each rollout, from 0.
        included: [B] bool, False for rollouts that are in no statistic.
        joint: gains and scores have one mean and one std; otherwise each kind has its own.

    Returns:
        [B, K]; 0 for turns that do not exist or are not included, and where all that is compared is equal.
    """
    check_shapes("B K, B, B, B, B", turn_gains, rewards, answer_turn, group_ids, included)
    turns, last = torch.arange(turn_gains.shape[1]), answer_turn.cpu()[:, None]
    values = torch.where(turns == last, rewards.cpu().double()[:, None], turn_gains.cpu().double())
    exists = (turns <= last) & included.cpu()[:, None]
    kinds = torch.zeros_like(last) if joint else (turns == last).long()
    normalised = _standardize_within(values, group_ids.cpu()[:, None] * 2 + kinds, exists)
    lone = _is_singleton(group_ids)[:, None] & exists
    return torch.where(lone, values / (1 + _EPSILON), normalised)


def discounted_sums(turn_rewards: Tensor, gamma: float) -> Tensor:
    """A_t = sum over k >= t of gamma^(k - t) r_k.

    Args:
        turn_rewards: [B, K], 0 for turns that do not exist.
        gamma: discount per turn.

    Returns:
        [B, K].
    """
    check_shapes("B K", turn_rewards)
    sums = turn_rewards.clone()
    for turn in range(turn_rewards.shape[1] - 2, -1, -1):
        sums[:, turn] += gamma * sums[:, turn + 1]
    return sums


def spread_over_tokens(turn_advantages: Tensor, turn_ids: Tensor) -> Tensor:
    """Give each token the advantage of its turn.

    Args:
        turn_advantages: [B, K].
        turn_ids: [B, T] turn of each policy token, -1 elsewhere.

    Returns:
        [B, T], 0 where the token belongs to no turn; as exact as ``turn_advantages``, where ``turn_ids`` is.
    """
    check_shapes("B K, B T", turn_advantages, turn_ids)
    per_token = turn_advantages.to(turn_ids.device).gather(1, turn_ids.clamp(min=0))
    return torch.where(turn_ids >= 0, per_token, 0.0)


def _with_singletons(compared: Tensor, lone: Tensor, group_ids: Tensor, included: Tensor) -> Tensor:
    """[B] of the dtype of ``lone``: ``lone`` at included rollouts of groups of one, ``compared`` elsewhere."""
    check_shapes("B, B, B, B", compared, lone, group_ids, included)
    return torch.where(_is_singleton(group_ids) & included.cpu(), lone.cpu().double(), compared).to(lone)


def _is_singleton(group_ids: Tensor) -> Tensor:
    """[B] bool, on the CPU: rollouts that are the only one of their group, included or not."""
    ids = group_ids.cpu()
    return (torch.bincount(ids) == 1)[ids]


def _standardize_within(values: Tensor, set_ids: Tensor, counted: Tensor, by_std: bool = True) -> Tensor:
    """(value - mean) / (std + 1e-6) over the counted members of each set, std with n - 1; or value - mean alone.

    Args:
        values: of any shape.
        set_ids: set of each value, from 0, of a shape that expands to that of the values; ignored where a value is not
            counted.
        counted: bool, of the shape of the values.
        by_std: whether to divide.

    Returns:
        float64 of the shape of the values, on the CPU; exactly 0 where a value is not counted, and in sets with fewer
        than two counted values or equal ones.
    """
    counts = counted.cpu().flatten()
    ids = torch.where(counts, set_ids.cpu().expand_as(values).flatten(), 0)
    # float64: in float32 the mean of equal rewards can miss them by one bit, which the tiny epsilon blows up to 0.05.
    numbers = torch.where(counts, values.cpu().double().flatten(), 0.0)
    size = group_sum(counts, ids)
    mean = (group_sum(numbers, ids) / size.clamp(min=1))[ids]
    centred = torch.where(counts, numbers - mean, 0.0)
    if by_std:
        std = (group_sum(centred.square(), ids) / (size - 1).clamp(min=1)).sqrt()[ids]
        centred = centred / (std + _EPSILON)
    varies = (size >= 2)[ids] & ~_zero_variance(numbers, ids, counts)
    return torch.where(counts & varies, centred, 0.0).view_as(values)


def _zero_variance(values: Tensor, set_ids: Tensor, counted: Tensor) -> Tensor:
    """[N] bool: all counted values of the set are equal."""
    start = torch.zeros(int(set_ids.max()) + 1, dtype=values.dtype)
    highest = start.scatter_reduce(0, set_ids[counted], values[counted], "amax", include_self=False)
    lowest = start.scatter_reduce(0, set_ids[counted], values[counted], "amin", include_self=False)
    return (highest == lowest)[set_ids]
