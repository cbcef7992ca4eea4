"""A penalty on likelihood displacement: tokens that were not penalized keep their likelihood."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from calibadv.batch import LossInputs
from calibadv.errors import UserError
from calibadv.interfaces import Regularizer
from calibadv.numerics.masked import check_shapes, group_sum
from calibadv.types import Metrics


class LLDS(Regularizer):
    """coef / N x sum of max(logp_old - logp, 0) over the tokens with A >= 0 in turns that have lost likelihood.

    Against lazy likelihood displacement (arXiv 2512.04220, as collected): updates lower the likelihood of rewarded
    rollouts too, until training collapses. A turn has lost likelihood if the sum of logp_old - logp over its tokens
    with A >= 0 is above 0. N is the trained tokens of the mini-batch. Rollouts whose advantage is 0 are pulled on too.

    Args:
        coef: Weight of the term.
        gate: Sum up what was lost per ``action``, which is a turn, or per ``response``, the whole rollout.
        tolerance: A change of a log-probability that counts as none, for it may be rounding, which is below 1e-5 in
            float32. Raise it in half precision; stability/sampler_drift_max of TransformersEngine shows its size.
    """

    requires_multiple_updates = True

    def __init__(
        self, coef: float = 0.1, gate: Literal["action", "response"] = "action", tolerance: float = 1e-4
    ) -> None:
        if not coef > 0:
            raise UserError(f"the coef of LLDS is {coef}; it must be above 0, as in 0.1, or leave LLDS out")
        if not tolerance >= 0:
            raise UserError(f"the tolerance of LLDS is {tolerance}; it must be at least 0, as in 1e-4")
        self.coef = coef
        self.gate = gate
        self.tolerance = tolerance

    @override
    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        units = inputs.rollout_ids
        if self.gate == "action":
            units = units * (inputs.turn_ids.max() + 1) + inputs.turn_ids
        loss, gated = _likelihood_displacement(
            inputs.logprobs, inputs.old_logprobs, inputs.advantages >= 0, units, self.tolerance
        )
        term = self.coef * loss.sum() / inputs.denominator
        return term, {"llds": term.item(), "llds_gated": gated.sum().item() / inputs.denominator}


def _likelihood_displacement(
    logprobs: Tensor, old_logprobs: Tensor, kept: Tensor, unit_ids: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """max(logp_old - logp, 0) for the kept tokens of the units whose kept tokens have lost likelihood together (LLDS).

    A change of at most ``tolerance`` counts as none, for the gate and for the token. The same weights give
    log-probabilities that differ by rounding when rollouts are batched in another way. In the first mini-batch of a
    step, where nothing has changed yet, the sign of that rounding would otherwise open half of the gates and push half
    of their tokens up, at full strength: the gradient of max(x, 0) does not depend on the size of x.

    Args:
        logprobs: [N] of the policy now.
        old_logprobs: [N] of the policy before the first update.
        kept: [N] bool, the tokens that should keep their likelihood.
        unit_ids: [N] turn or rollout of each token, from 0.
        tolerance: the largest change of a log-probability that counts as none.

    Returns:
        [N], with gradient; and [N] bool, the kept tokens of the units that have lost likelihood.
    """
    check_shapes("N, N, N, N", logprobs, old_logprobs, kept, unit_ids)
    loss = old_logprobs - logprobs
    change = loss.detach()
    change = torch.where(kept & (change.abs() > tolerance), change, 0.0)
    open_units = group_sum(change, unit_ids) > 0
    gated = kept & open_units.to(kept.device)[unit_ids]
    return torch.where(gated & (change > 0), loss, 0.0), gated
