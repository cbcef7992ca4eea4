"""The objective: the policy loss, the KL to the reference, and further terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from calibadv.batch import LossInputs
from calibadv.errors import UserError, shown
from calibadv.interfaces import PolicyLoss, Regularizer
from calibadv.numerics.kl import KL_ESTIMATORS, KLEstimator, k3
from calibadv.training.advantages import checked_pair
from calibadv.types import Metrics

# Curves of every update, which no part may report another value of.
_OURS = ("loss", "kl_old", "kl_reference", "grad_norm", "grad_norm_max", "skipped_updates")


@dataclass(frozen=True, slots=True)
class Objective:
    """The sum that is minimised: the policy loss, the KL to the reference, and further terms."""

    loss: PolicyLoss
    kl_coef: float
    regularizers: tuple[Regularizer, ...]
    kl_estimator: KLEstimator = "k3"

    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        """Sum the terms of one micro-batch."""
        loss, reported = checked_term(self.loss.compute(inputs), self.loss)
        metrics = _merge({}, reported, self.loss)
        metrics["kl_old"] = k3(inputs.logprobs.detach(), inputs.old_logprobs).sum().item() / inputs.denominator
        if inputs.reference_logprobs is not None:
            estimate = KL_ESTIMATORS[self.kl_estimator]
            kl = estimate(inputs.logprobs, inputs.reference_logprobs).sum() / inputs.denominator
            loss = loss + self.kl_coef * kl
            metrics["kl_reference"] = kl.item()
        for regularizer in self.regularizers:
            term, reported = checked_term(regularizer.compute(inputs), regularizer)
            loss = loss + term
            metrics = _merge(metrics, reported, regularizer)
        return loss, {**metrics, "loss": loss.item()}

    @property
    def grad_without_advantage(self) -> bool:
        """True if a term pulls on tokens whose advantage is 0."""
        return bool(self.kl_coef or self.regularizers)


def _merge(metrics: Metrics, reported: Metrics, part: PolicyLoss | Regularizer) -> Metrics:
    taken = reported.keys() & {*metrics, *_OURS}
    if taken:
        raise UserError(f"{type(part).__name__} reports the metric '{min(taken)}', which is taken; rename it there")
    return {**metrics, **reported}


def checked_term(returned: Any, part: PolicyLoss | Regularizer) -> tuple[Tensor, Metrics]:
    """See that a part returned a term of the loss, and metrics."""
    term, metrics = checked_pair(returned, part)
    if not (isinstance(term, Tensor) and term.dim() == 0):
        what = f"a tensor of shape {list(term.shape)}" if isinstance(term, Tensor) else shown(term)
        raise UserError(f"{type(part).__name__} returned {what} as its term of the loss, which is a scalar tensor")
    return term, metrics
