"""How much likelihood tokens have lost since an update began (arXiv 2512.04220)."""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.numerics.masked import group_sum
from calibadv.numerics.shapes import check_shapes


def lost_likelihood(
    logprobs: Tensor, old_logprobs: Tensor, kept: Tensor, unit_ids: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """max(logp_old - logp, 0) for the kept tokens of the units whose kept tokens have lost likelihood together.

    A change of at most ``tolerance`` counts as none, for the gate and for the token. The same weights give
    log-probabilities that differ by rounding when rollouts are batched in another way. In the first mini-batch of a
    step, where nothing has changed yet, the sign of that rounding would otherwise open half of the gates and push half
    of their tokens up, at full strength: the gradient of max(x, 0) does not depend on the size of x.

    Args:
        logprobs: [N] of the policy now.
        old_logprobs: [N] of the policy before the first update, by the same model.
        kept: [N] bool, the tokens whose likelihood is to be kept.
        unit_ids: [N] unit of each token, such as its turn: the tokens that share a gate.
        tolerance: the largest change that may be rounding.

    Returns:
        [N], with the gradient -1 with respect to ``logprobs`` where it is above 0; and [N] bool, the kept tokens of the
        units whose gate is open.
    """
    check_shapes("N, N, N, N", logprobs, old_logprobs, kept, unit_ids)
    loss = old_logprobs - logprobs
    change = loss.detach()
    change = torch.where(kept & (change.abs() > tolerance), change, 0.0)
    open_units = group_sum(change, unit_ids) > 0
    gated = kept & open_units.to(kept.device)[unit_ids]
    return torch.where(gated & (change > 0), loss, 0.0), gated
