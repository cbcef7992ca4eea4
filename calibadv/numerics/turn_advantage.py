"""Advantages of turns: what MT-GRPO, GiGPO and IGPO make of rewards that differ from turn to turn.

All of it is computed in float64 on the CPU, wherever the batch is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.numerics.advantage import EPSILON, alone, relative
from calibadv.numerics.shapes import check_shapes


def turn_index_advantages(turn_rewards: Tensor, answer_turn: Tensor, group_ids: Tensor, included: Tensor) -> Tensor:
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
    return _relative(turn_rewards, group_ids.cpu()[:, None] * len(turns) + turns, searches)


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
    return _relative(returns, step_groups, anchors >= 0, by_std)


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
    normalised = _relative(values, group_ids.cpu()[:, None] * 2 + kinds, exists)
    lone = alone(group_ids)[:, None] & exists
    return torch.where(lone, values / (1 + EPSILON), normalised)


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


def _relative(values: Tensor, set_ids: Tensor, counted: Tensor, by_std: bool = True) -> Tensor:
    sets = set_ids.expand_as(values).flatten()
    return relative(values.flatten(), sets, counted.flatten(), by_std).view_as(values)
