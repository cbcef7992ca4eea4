"""What is minimised: the policy loss and what is added to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from calibadv.interfaces import LossInputs, Metrics, PolicyLoss, Regularizer
from calibadv.numerics.kl import k3
from calibadv.update import ReadyBatch

# Curves of every update, which no part may report another value of.
_OURS = ("loss", "kl_old", "kl_reference", "grad_norm", "grad_norm_max")


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: the policy loss, the KL to the reference, and further terms."""

    loss: PolicyLoss
    kl_coef: float
    regularizers: tuple[Regularizer, ...]

    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        """Add up the terms for one micro-batch.

        Args:
            inputs: N trained tokens.

        Returns:
            A scalar with gradient; and metrics that add up over micro-batches.
        """
        loss, reported = self.loss.compute(inputs)
        metrics = _merge({}, reported, self.loss)
        metrics["kl_old"] = k3(inputs.logprobs.detach(), inputs.old_logprobs).sum().item() / inputs.denominator
        if inputs.reference_logprobs is not None:
            kl = k3(inputs.logprobs, inputs.reference_logprobs).sum() / inputs.denominator
            loss = loss + self.kl_coef * kl
            metrics["kl_reference"] = kl.item()
        for regularizer in self.regularizers:
            term, reported = regularizer.compute(inputs)
            loss = loss + term
            metrics = _merge(metrics, reported, regularizer)
        return loss, {**metrics, "loss": loss.item()}

    def split(self, ready: ReadyBatch, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Tell the rollouts that move the policy from those that only count, and so need no backward pass.

        Where the advantages of a rollout are all 0, as in a group with equal rewards, the gradient of the policy loss
        is exactly 0; a KL or another term still pulls on it.

        Args:
            ready: the rollout batch.
            rows: a mini-batch.

        Returns:
            The two parts of ``rows``. Where nothing would move all are in the first, so that the gradient is 0 and not
            missing: to AdamW that is a difference.
        """
        has_advantage = ready.advantages.any(dim=1).tolist()
        moving = [row for row in rows if has_advantage[row]]
        if self.kl_coef or self.regularizers or not moving:
            return list(rows), []
        return moving, [row for row in rows if not has_advantage[row]]


def _merge(metrics: Metrics, reported: Metrics, part: PolicyLoss | Regularizer) -> Metrics:
    taken = reported.keys() & {*metrics, *_OURS}
    if taken:
        raise ValueError(f"{type(part).__name__} reports the metric '{min(taken)}', which is taken; rename it there")
    return {**metrics, **reported}
