"""Multi-turn GRPO: a reward for each search beside the one for the answer."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.estimators._broadcast import broadcast_turn_values
from calibadv.estimators._validation import check_weight
from calibadv.interfaces import AdvantageEstimator
from calibadv.numerics.advantages import group_normalise, per_turn_group_advantages


class MTGRPO(AdvantageEstimator):
    """Credit searches for what they find, compared over the group per turn index: MT-GRPO (arXiv 2505.11821).

    A search turn gets A_turn + outcome_weight x A_outcome, the answer turn A_outcome, where A_outcome is GRPO's
    advantage and A_turn the turn's reward, normalised over the search turns of that index in the group. The reward of a
    turn is its step correctness, so no labels are needed. The published code has two turns and weighs A_turn instead;
    with a weight of 1 that is the same.

    Its weakness: turns of one index have different histories, and fewer and fewer rollouts have a late turn. A turn
    that no other rollout of the group has gets A_turn = 0.

    Args:
        outcome_weight: Weight of the outcome's advantage at search turns.
    """

    uses_step_correctness = True
    uses_zero_variance_groups = True

    def __init__(self, outcome_weight: float = 1.0) -> None:
        check_weight("outcome_weight", outcome_weight)
        self.outcome_weight = outcome_weight

    @override
    def estimate(self, batch: RolloutBatch) -> Tensor:
        group = batch.group_ids, batch.included
        outcome = group_normalise(batch.rewards.cpu().double(), *group)[:, None]
        per_turn = per_turn_group_advantages(batch.step_correctness, batch.answer_turn, *group)
        is_answer = torch.arange(per_turn.shape[1]) == batch.answer_turn.cpu()[:, None]
        return broadcast_turn_values(torch.where(is_answer, outcome, per_turn + self.outcome_weight * outcome), batch)
