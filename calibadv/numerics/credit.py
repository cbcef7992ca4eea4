"""CalibAdv's soft penalty and answer rebalance (arXiv 2604.18235), and rules on the signs of advantages alone."""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.numerics.masked import check_shapes


def negative_tokens(advantages: Tensor, turn_ids: Tensor, num_turns: int) -> tuple[Tensor, Tensor]:
    """Find the policy's tokens with a negative advantage: few of a batch, so that what follows need not read it all.

    Args:
        advantages: [B, T], 0 outside the loss mask.
        turn_ids: [B, T] turn of each policy token, -1 elsewhere.
        num_turns: K.

    Returns:
        [N] indices of the tokens in the flattened [B, T]; and [N] indices of their turns in the flattened [B, K].
    """
    check_shapes("B T, B T", advantages, turn_ids)
    tokens = ((advantages < 0) & (turn_ids >= 0)).flatten().nonzero()[:, 0]
    rows = tokens.div(advantages.shape[1], rounding_mode="floor")
    return tokens, rows * num_turns + turn_ids.flatten()[tokens]


def scale_negative_turns(advantages: Tensor, step_correctness: Tensor, tokens: Tensor, turns: Tensor) -> Tensor:
    """Multiply the advantages of some tokens by (1 - correctness of the turn): CalibAdv's soft penalty.

    Args:
        advantages: [B, T].
        step_correctness: [B, K] in [0, 1].
        tokens: [N] indices in the flattened [B, T], of ``negative_tokens``.
        turns: [N] indices of their turns in the flattened [B, K].

    Returns:
        [B, T].
    """
    check_shapes("B T, B K, N, N", advantages, step_correctness, tokens, turns)
    factors = 1 - step_correctness.to(advantages.dtype).flatten()[turns]
    scaled = advantages.flatten()
    return scaled.index_put((tokens,), scaled[tokens] * factors).view_as(advantages)


def penalized_search_turns(turn_advantages: Tensor, answer_turn: Tensor) -> Tensor:
    """Find the search turns with a negative advantage.

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

    P is the sum of their positive advantages and N the sum of their absolute negative ones. Applied by
    ``scale_answers``, these factors are CalibAdv's answer rebalance.

    Args:
        advantages: [B, T].
        answer_mask: [B, T] bool, True at the trained tokens of the answer turns.
        group_ids: [B] group of each rollout, from 0.
        target_ratio: what P / N shall be (lambda in the paper).

    Returns:
        [number of groups] float64, on the CPU; 0 where P or N is 0.
    """
    check_shapes("B T, B T, B", advantages, answer_mask, group_ids)
    rows, columns = answer_mask.nonzero(as_tuple=True)  # one token in ten: the rest is not read
    answers, groups = advantages[rows, columns].cpu().double(), group_ids.cpu()[rows.cpu()]
    count = int(group_ids.max()) + 1
    positive, negative = (
        torch.zeros(count, dtype=torch.float64).index_add_(0, groups, side.clamp(min=0)) for side in (answers, -answers)
    )
    return torch.where(positive > 0, target_ratio * negative / positive, 0.0)


def scale_answers(advantages: Tensor, answer_mask: Tensor, group_ids: Tensor, factors: Tensor) -> Tensor:
    """Multiply the positive answer advantages of each group by its factor; where that is 0, all become 0.

    Args:
        advantages: [B, T].
        answer_mask: [B, T] bool, True at the trained tokens of the answer turns.
        group_ids: [B] group of each rollout, from 0.
        factors: [number of groups], of ``rebalance_factors``.

    Returns:
        [B, T]; differs from ``advantages`` only inside ``answer_mask``.
    """
    tokens = answer_mask.nonzero(as_tuple=True)
    answers = advantages[tokens]
    scale = factors.to(advantages)[group_ids[tokens[0]]]
    scaled = torch.where(answers > 0, answers * scale, torch.where(scale > 0, answers, 0.0))
    return advantages.index_put(tokens, scaled)


def scale_by_sign(advantages: Tensor, positive_weight: float, negative_weight: float) -> Tensor:
    """A+ x positive_weight, A- x negative_weight (W-REINFORCE, arXiv 2506.01347).

    Args:
        advantages: [B, T].
        positive_weight: factor of positive advantages.
        negative_weight: factor of negative ones.

    Returns:
        [B, T].
    """
    return torch.where(advantages > 0, advantages * positive_weight, advantages * negative_weight)


def matching_negative_weight(advantages: Tensor, target: Tensor, positive_weight: float) -> float | None:
    """The factor of negative advantages that gives them the P/N of other advantages, over all tokens.

    Args:
        advantages: [B, T] to be scaled.
        target: [B, T] whose P/N they shall get.
        positive_weight: factor of the positive ones of ``advantages``.

    Returns:
        positive_weight x P x N_target / (N x P_target); None where P, N or P_target is 0, which no factor can match.
    """
    check_shapes("B T, B T", advantages, target)
    positive, negative = sign_masses(advantages)
    target_positive, target_negative = sign_masses(target)
    if not (positive and negative and target_positive):
        return None
    return positive_weight * positive * target_negative / (negative * target_positive)


def sign_masses(advantages: Tensor) -> tuple[float, float]:
    """P and N: the sum of the positive advantages of all tokens, and that of the absolute negative ones.

    Args:
        advantages: [B, T].

    Returns:
        Both, computed in float64.
    """
    values = advantages[advantages != 0].cpu().double()
    return float(values.clamp(min=0).sum()), float(-values.clamp(max=0).sum())


def negative_floor(advantages: Tensor, bound: float) -> float | None:
    """-bound x the mean of the positive advantages over their tokens.

    Args:
        advantages: [B, T].
        bound: times the mean.

    Returns:
        A number below 0; None without a positive advantage.
    """
    positive = advantages[advantages > 0].cpu().double()
    return -bound * float(positive.mean()) if len(positive) else None
