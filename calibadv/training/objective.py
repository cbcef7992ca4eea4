"""What is minimised: the policy loss and what is added to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from calibadv.errors import UserError, shown
from calibadv.interfaces import LossInputs, PolicyLoss, Regularizer
from calibadv.numerics.kl import KL_ESTIMATORS, KLEstimator, k3
from calibadv.training.contracts import checked_pair
from calibadv.training.logprobs import ReadyBatch
from calibadv.types import Metrics

log = logging.getLogger(__name__)

# Curves of every update, which no part may report another value of.
_OURS = ("loss", "kl_old", "kl_reference", "grad_norm", "grad_norm_max", "skipped_updates")


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: the policy loss, the KL to the reference, and further terms."""

    loss: PolicyLoss
    kl_coef: float
    regularizers: tuple[Regularizer, ...]
    kl_estimator: KLEstimator = "k3"

    def check(self, mini_batches: int, old_logprobs: str) -> None:
        """Refuse terms that cannot act as they are set up, or not together."""
        if not self.kl_coef and self.kl_estimator != "k3":
            raise UserError(
                f"model.kl_estimator is {self.kl_estimator} and model.kl_coef is 0, so there is no KL to estimate; "
                "set kl_coef, as in 0.001, or leave kl_estimator out"
            )
        if self.kl_estimator == "k1":
            log.warning(
                "model.kl_estimator is k1: as a term of the loss, its gradient does not depend on the reference, and "
                "nothing pulls the policy back to it; k2 and k3 do"
            )
        if self.loss.acts_on_change and mini_batches == 1 and old_logprobs == "trainer":
            log.warning(
                "model.mini_batches is 1, so nothing has moved yet when a rollout step makes its only update: what "
                "tells this %s from PPOClip's defaults never acts; set mini_batches to at least 2",
                type(self.loss).__name__,
            )
        kinds = [type(regularizer).__name__ for regularizer in self.regularizers]
        for kind, regularizer in zip(kinds, self.regularizers, strict=True):
            if kinds.count(kind) > 1:
                raise UserError(
                    f"model.regularizers names {kind} {kinds.count(kind)} times; keep one, with the sum of weights"
                )
            if regularizer.acts_on_change and old_logprobs == "engine":
                raise UserError(
                    f"model.old_logprobs is engine and {kind} acts on changes of the trainer's log-probabilities: "
                    "it would take the engine's other numerics for that; set old_logprobs to trainer"
                )
            if regularizer.acts_on_change and mini_batches < 2:
                raise UserError(
                    f"model.mini_batches is {mini_batches} and {kind} acts on what earlier updates of a rollout step "
                    f"have changed, of which there are none; set mini_batches to at least 2, or leave {kind} out"
                )

    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        """Add up the terms for one micro-batch."""
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
    def acts_without_advantage(self) -> bool:
        """Whether a term pulls on tokens whose advantage is 0."""
        return bool(self.kl_coef or self.regularizers)

    def split(self, ready: ReadyBatch, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Tell the rollouts that move the policy from those that only count, and so need no backward pass.

        Where the advantages of a rollout are all 0, as in a group with equal rewards, the gradient of the policy loss
        is exactly 0; a KL or another term still pulls on it.
        """
        has_advantage = ready.advantages.any(dim=1).tolist()
        moving = [row for row in rows if has_advantage[row]]
        if self.acts_without_advantage or not moving:
            return list(rows), []
        return moving, [row for row in rows if not has_advantage[row]]


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
