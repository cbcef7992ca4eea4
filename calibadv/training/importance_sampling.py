"""Truncated importance sampling: correct for an engine that samples from slightly other probabilities."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from calibadv.errors import UserError
from calibadv.numerics.masked import check_shapes
from calibadv.numerics.ratio import bounded_exponent
from calibadv.training.logprobs import UpdateBatch
from calibadv.types import Metrics


@dataclass
class TruncatedImportanceSampling:
    """Weight tokens by the trainer's over the engine's probability, truncated at a cap: their numerics may differ."""

    level: Literal["token", "sequence"] = "token"
    """One weight per token, or one per rollout."""
    cap: float = 2.0
    """The largest weight."""

    def __post_init__(self) -> None:
        if self.cap < 1:
            raise UserError(f"model.sampler_correction.cap is {self.cap}; it must be at least 1")

    def apply(self, update: UpdateBatch) -> tuple[UpdateBatch, Metrics]:
        """Multiply the advantages by the weights, which weights every surrogate that is linear in them."""
        mask = update.batch.loss_mask
        if not mask.any():
            return update, {}
        weights = truncated_weights(update.old.logprobs, update.batch.sampled_logprobs, mask, self.level, self.cap)
        metrics = {
            "stability/sampler_weight": weights[mask].mean().item(),
            "stability/sampler_weight_cut": (weights[mask] == self.cap).float().mean().item(),
        }
        return replace(update, advantages=update.advantages * weights), metrics


def truncated_weights(
    logprobs: Tensor, sampled_logprobs: Tensor, mask: Tensor, level: Literal["token", "sequence"], cap: float
) -> Tensor:
    """Compute min(exp(logp_trainer - logp_engine), cap), without gradient.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"), per token, or of the sums over a rollout's tokens.

    Args:
        logprobs: [B, T] of the trainer's model.
        sampled_logprobs: [B, T] of the engine.
        mask: [B, T] bool, the trained tokens.
        level: ``token`` or ``sequence``.
        cap: the largest weight.

    Returns:
        [B, T], 1 outside the mask.
    """
    check_shapes("B T, B T, B T", logprobs, sampled_logprobs, mask)
    difference = torch.where(mask, logprobs - sampled_logprobs, 0.0).detach()
    if level == "sequence":
        difference = difference.sum(dim=1, keepdim=True).expand_as(difference)
    return torch.where(mask, bounded_exponent(difference).exp().clamp(max=cap), 1.0)
