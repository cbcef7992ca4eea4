"""Log-probabilities of a rollout batch before and during its update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibadv.batch import RolloutBatch
from calibadv.distributed import ALONE, Processes
from calibadv.interfaces import LossInputs
from calibadv.policy.logprobs import forward_logprobs
from calibadv.training.minibatches import deal_micro_batches


@dataclass(frozen=True, slots=True)
class BatchLogprobs:
    """What the trainer's own model says of a rollout batch before it is updated on it.

    Attributes:
        policy: [B, T] log-probabilities of the tokens, 0 outside the loss mask.
        entropy: [B, T] entropy of the full softmax that each token was drawn from, 0 outside the loss mask.
        reference: [B, T] log-probabilities of the reference, or None.
    """

    policy: Tensor
    entropy: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ReadyBatch:
    """A rollout batch that is ready for the update.

    Attributes:
        batch: B rollouts.
        advantages: [B, T] after calibration.
        before: log-probabilities that the ratio and the KL compare with.
    """

    batch: RolloutBatch
    advantages: Tensor
    before: BatchLogprobs


@dataclass(frozen=True, slots=True)
class MiniBatchSize:
    """What the sums of a mini-batch are divided by, over all processes.

    Attributes:
        tokens: that are trained, those without advantage included.
        rollouts: with at least one of them.
    """

    tokens: float
    rollouts: int

    @staticmethod
    def of(batch: RolloutBatch, rows: Sequence[int]) -> MiniBatchSize:
        """Count."""
        trained: list[int] = batch.loss_mask[rows].sum(dim=1).tolist()
        return MiniBatchSize(float(sum(trained)), sum(tokens > 0 for tokens in trained))


def compute_logprobs(
    model: nn.Module,
    batch: RolloutBatch,
    token_budget: int,
    temperature: float,
    processes: Processes = ALONE,
) -> BatchLogprobs:
    """Log-probabilities and entropies of all trained tokens, without gradient."""
    logprobs = torch.zeros_like(batch.sampled_logprobs)
    entropies = torch.zeros_like(batch.sampled_logprobs)
    with torch.no_grad():
        for rows, counts in deal_micro_batches(batch, range(len(batch.rollouts)), token_budget, processes):
            found = forward_logprobs(model, batch, rows, temperature)
            if counts:
                places = _places(batch, rows)
                logprobs[places], entropies[places] = found
    return BatchLogprobs(processes.add_up(logprobs), processes.add_up(entropies))


def loss_inputs(
    model: nn.Module, ready: ReadyBatch, rows: Sequence[int], temperature: float, size: MiniBatchSize
) -> LossInputs:
    """Run the policy over one micro-batch, with gradient, and put together what the loss looks at."""
    logprobs, _ = forward_logprobs(model, ready.batch, rows, temperature)
    places = _places(ready.batch, rows)
    reference = ready.before.reference
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=ready.before.policy[places],
        reference_logprobs=None if reference is None else reference[places],
        advantages=ready.advantages[places],
        denominator=size.tokens,
        rollout_ids=places[0],
        turn_ids=ready.batch.turn_ids[places],
        num_rollouts=size.rollouts,
    )


def _places(batch: RolloutBatch, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Indices (row, token) of the trained tokens of some rows, in the order of ``forward_logprobs``."""
    within, columns = batch.loss_mask[rows].nonzero(as_tuple=True)
    return torch.as_tensor(rows, device=within.device)[within], columns
