"""Log-probabilities of a rollout batch, before and during its update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from calibadv.batch import LossInputs, RolloutBatch
from calibadv.distributed import SINGLE_PROCESS, ProcessGroup
from calibadv.policy.logprobs import forward_logprobs
from calibadv.policy.reference import Reference
from calibadv.training.minibatches import LossNormalizer, partition_micro_batches


@dataclass(frozen=True, slots=True)
class BatchLogprobs:
    """Log-probabilities of a rollout batch by the trainer's model, before its update."""

    logprobs: Tensor  # [B, T] of the tokens, 0 outside the loss mask
    entropy: Tensor  # [B, T] of the full softmax that each token was drawn from, 0 outside the loss mask
    reference: Tensor | None = None  # [B, T] log-probabilities of the reference, or None


@dataclass(frozen=True, slots=True)
class UpdateBatch:
    """A rollout batch with everything that its update needs."""

    batch: RolloutBatch  # B rollouts
    estimated: Tensor  # [B, T] advantages of the estimator
    advantages: Tensor  # [B, T] advantages after calibration
    old: BatchLogprobs  # log-probabilities that the ratio and the KL compare with

    def with_engine_logprobs(self) -> UpdateBatch:
        """Return the same update with the engine's log-probabilities as the old ones."""
        return replace(self, old=replace(self.old, logprobs=self.batch.sampled_logprobs))


def compute_logprobs(
    model: nn.Module,
    batch: RolloutBatch,
    token_budget: int,
    temperature: float,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> BatchLogprobs:
    """Compute log-probabilities and entropies of all trained tokens, without gradient.

    Args:
        model: the policy, or its reference.
        batch: B rollouts.
        token_budget: the most tokens, padding included, of one forward pass.
        temperature: sampling temperature; logits are divided by it.
        processes: the ranks that share the work.

    Returns:
        Two tensors [B, T], equal on all ranks.
    """
    logprobs = torch.zeros_like(batch.sampled_logprobs)
    entropies = torch.zeros_like(batch.sampled_logprobs)
    with torch.no_grad():
        for rows, is_padding in partition_micro_batches(batch, range(len(batch.rollouts)), token_budget, processes):
            found = forward_logprobs(model, batch, rows, temperature)
            if not is_padding:
                index = _trained_tokens(batch, rows)
                logprobs[index], entropies[index] = found
    return BatchLogprobs(processes.all_reduce_sum(logprobs), processes.all_reduce_sum(entropies))


def compute_old_logprobs(
    model: nn.Module,
    reference: Reference | None,
    batch: RolloutBatch,
    token_budget: int,
    temperature: float,
    processes: ProcessGroup,
) -> BatchLogprobs:
    """Compute the log-probabilities of the policy before the update and, if there is one, of the reference."""
    old = compute_logprobs(model, batch, token_budget, temperature, processes)
    if reference is None:
        return old
    with reference.model(model) as frozen:
        return replace(old, reference=compute_logprobs(frozen, batch, token_budget, temperature, processes).logprobs)


def loss_inputs(
    model: nn.Module, update: UpdateBatch, rows: Sequence[int], temperature: float, normalizer: LossNormalizer
) -> LossInputs:
    """Run the policy over one micro-batch and return what a loss looks at: its N trained tokens, flattened.

    Args:
        model: the policy.
        update: the rollout batch with advantages and old log-probabilities.
        rows: the micro-batch.
        temperature: sampling temperature.
        normalizer: denominators of the whole mini-batch.

    Returns:
        Tensors of [N], of which the log-probabilities have a gradient.
    """
    logprobs, _ = forward_logprobs(model, update.batch, rows, temperature)
    index = _trained_tokens(update.batch, rows)
    reference = update.old.reference
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=update.old.logprobs[index],
        reference_logprobs=None if reference is None else reference[index],
        advantages=update.advantages[index],
        denominator=normalizer.tokens,
        rollout_ids=index[0],
        turn_ids=update.batch.turn_ids[index],
        num_rollouts=normalizer.rollouts,
    )


def _trained_tokens(batch: RolloutBatch, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Indices (row, token) of the trained tokens of some rows, in the order of ``forward_logprobs``."""
    within, columns = batch.loss_mask[rows].nonzero(as_tuple=True)
    return torch.as_tensor(rows, device=within.device)[within], columns
