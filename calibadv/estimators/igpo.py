"""Information-gain policy optimization: reward each search by how much likelier it makes the golden answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.errors import UserError
from calibadv.estimators._answer_likelihood import golden_probabilities, turn_gains
from calibadv.estimators._broadcast import of_turns
from calibadv.estimators._validation import check_gamma
from calibadv.interfaces import AdvantageEstimator
from calibadv.numerics.advantages import discounted_sums, gain_rewards

if TYPE_CHECKING:
    from calibadv.distributed import ProcessGroup
    from calibadv.policy.policy import Policy


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
    def prepare(
        self, batch: RolloutBatch, policy: Policy, micro_batch_tokens: int, processes: ProcessGroup
    ) -> RolloutBatch:
        probabilities = golden_probabilities(batch, policy, micro_batch_tokens, processes)
        return replace(batch, turn_gains=turn_gains(probabilities, batch.answer_turn))

    @override
    def estimate(self, batch: RolloutBatch) -> Tensor:
        if batch.turn_gains is None:
            raise UserError(
                "IGPO needs the policy's probability of the golden answer before each turn, which recorded rollouts do "
                "not hold; train with it (calibadv fit), or take another estimator here"
            )
        normalised = gain_rewards(
            batch.turn_gains,
            batch.rewards,
            batch.answer_turn,
            batch.group_ids,
            batch.included,
            joint=self.normalise == "joint",
        )
        return of_turns(discounted_sums(normalised, self.gamma), batch)
