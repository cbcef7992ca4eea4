"""Information-gain policy optimization: reward each search by how much likelier it makes the golden answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.distributed import ProcessGroup
from calibadv.errors import UserError
from calibadv.estimators._answer_likelihood import answer_likelihoods, turn_gains
from calibadv.estimators._broadcast import broadcast_turn_values
from calibadv.estimators._validation import check_gamma
from calibadv.interfaces import AdvantageEstimator
from calibadv.numerics.advantages import discounted_sums, gain_rewards
from calibadv.policy.policy import Policy
from calibadv.types import Metrics

_GAINS = "turn_gains"


class IGPO(AdvantageEstimator):
    """Reward a search by how much likelier it makes the golden answer: IGPO (arXiv 2510.14967).

    p_t is the probability that the policy gives the first golden answer after turn t: the exponential of the mean
    log-probability of the answer's tokens, at temperature 1, when it is written at once, after an empty think. The
    reward of search turn t is p_t - p_(t-1), that of the answer turn the reward of the rollout: 0 for a broken format,
    where the paper has a penalty. The rewards of all turns of a group are normalised, and each turn gets the discounted
    sum of its own and all later ones.

    It costs one pass through the model for each turn of a rollout, over what was written before the turn. Recorded
    rollouts do not hold the probabilities, so ``calibadv replay`` cannot use it.

    Args:
        gamma: Discount of later turns' rewards.
        normalise: Compare gains and answers ``joint``, with one mean and one standard deviation, or ``separate``.
    """

    uses_zero_variance_groups = True

    def __init__(self, gamma: float = 1.0, normalise: Literal["joint", "separate"] = "joint") -> None:
        check_gamma(gamma)
        self.gamma = gamma
        self.normalise = normalise

    @override
    def extras(
        self, batch: RolloutBatch, policy: Policy, micro_batch_tokens: int, processes: ProcessGroup
    ) -> Mapping[str, Tensor]:
        likelihoods = answer_likelihoods(batch, policy, micro_batch_tokens, processes)
        return {_GAINS: turn_gains(likelihoods, batch.answer_turn)}

    @override
    def metrics(self, batch: RolloutBatch) -> Metrics:
        turns = torch.arange(batch.step_correctness.shape[1], device=batch.answer_turn.device)
        gains = batch.extras[_GAINS][(turns < batch.answer_turn[:, None]) & batch.included[:, None]].tolist()
        return {"credit/turn_gain": sum(gains) / len(gains)} if gains else {}

    @override
    def estimate(self, batch: RolloutBatch) -> Tensor:
        if _GAINS not in batch.extras:
            raise UserError(
                "IGPO needs the policy's probability of the golden answer before each turn, which recorded rollouts do "
                "not hold; train with it (calibadv fit), or take another estimator here"
            )
        normalised = gain_rewards(
            batch.extras[_GAINS],
            batch.rewards,
            batch.answer_turn,
            batch.group_ids,
            batch.included,
            joint=self.normalise == "joint",
        )
        return broadcast_turn_values(discounted_sums(normalised, self.gamma), batch)
