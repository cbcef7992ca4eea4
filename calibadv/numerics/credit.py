"""The two rules of CalibAdv (arXiv 2604.18235): soften useful searches, balance the answers."""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.numerics.masked import group_sum
from calibadv.numerics.shapes import check_shapes


def soft_penalty(advantages: Tensor, step_correctness: Tensor, turn_ids: Tensor) -> Tensor:
    """Multiply negative advantages by (1 - correctness of the turn).

    Args:
        advantages: [B, T], 0 outside the loss mask.
        step_correctness: [B, K] in [0, 1], 0 for the answer turn.
        turn_ids: [B, T] turn of each policy token, -1 elsewhere.

    Returns:
        [B, T]; differs from ``advantages`` only at negative tokens of turns that found evidence.
    """
    check_shapes("B T, B K, B T", advantages, step_correctness, turn_ids)
    correctness = step_correctness.to(advantages.dtype).gather(1, turn_ids.clamp(min=0))
    penalised = (advantages < 0) & (turn_ids >= 0)
    return torch.where(penalised, advantages * (1 - correctness), advantages)


def negative_search_turns(turn_advantages: Tensor, answer_turn: Tensor) -> Tensor:
    """The search turns that are punished.

    Args:
        turn_advantages: [B, K] advantage of each turn, 0 for turns that do not exist or are not trained.
        answer_turn: [B] index of the answer turn.

    Returns:
        [B, K] bool.
    """
    check_shapes("B K, B", turn_advantages, answer_turn)
    turns = torch.arange(turn_advantages.shape[1], device=answer_turn.device)
    return (turn_advantages < 0) & (turns < answer_turn[:, None])


def rebalance_factors(advantages: Tensor, answer_mask: Tensor, group_ids: Tensor, target_ratio: float) -> Tensor:
    """target_ratio x N / P of each group, over the answer tokens of all its rollouts.

    P is the sum of their positive advantages and N the sum of their absolute negative ones.

    Args:
        advantages: [B, T].
        answer_mask: [B, T] bool, True at the trained tokens of the answer turns.
        group_ids: [B] group of each rollout, from 0.
        target_ratio: what P / N shall be (lambda in the paper).

    Returns:
        [number of groups] float64, on the CPU; 0 where P or N is 0.
    """
    check_shapes("B T, B T, B", advantages, answer_mask, group_ids)
    answers = torch.where(answer_mask, advantages, 0.0).cpu().double()
    positive = group_sum(answers.clamp(min=0).sum(1), group_ids)
    negative = group_sum((-answers).clamp(min=0).sum(1), group_ids)
    return torch.where(positive > 0, target_ratio * negative / positive, 0.0)


def answer_rebalance(advantages: Tensor, answer_mask: Tensor, group_ids: Tensor, target_ratio: float) -> Tensor:
    """Scale the positive answer advantages of each group so that P = target_ratio x N.

    Where P or N is 0 there is nothing to balance, and all answer tokens of the group get 0.

    Args:
        advantages: [B, T].
        answer_mask: [B, T] bool, True at the trained tokens of the answer turns.
        group_ids: [B] group of each rollout, from 0.
        target_ratio: what P / N shall be (lambda in the paper).

    Returns:
        [B, T]; differs from ``advantages`` only inside ``answer_mask``.
    """
    per_group = rebalance_factors(advantages, answer_mask, group_ids, target_ratio).to(advantages)
    factors = per_group[group_ids, None]
    balanced = torch.where(advantages > 0, advantages * factors, advantages)
    return torch.where(answer_mask, torch.where(factors > 0, balanced, 0.0), advantages)
