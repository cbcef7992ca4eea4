"""From calibrated advantages to the gradient: micro-batches, log-probabilities, mini-batches, the loss.

A *mini-batch* is one optimizer step: a block of whole questions. A *micro-batch* is what one forward pass holds:
rollouts up to a budget of tokens. How a mini-batch is cut changes memory and speed, never the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from calibadv.forward import forward_logprobs
from calibadv.interfaces import LossInputs, Metrics
from calibadv.numerics.draws import uniforms
from calibadv.numerics.perplexity import message_perplexities
from calibadv.processes import ALONE, Processes
from calibadv.types import DrawKey, RolloutBatch


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
        """Count.

        Args:
            batch: B rollouts, those of all processes.
            rows: the mini-batch.

        Returns:
            Its size.
        """
        trained: list[int] = batch.loss_mask[rows].sum(dim=1).tolist()
        return MiniBatchSize(float(sum(trained)), sum(tokens > 0 for tokens in trained))


def micro_batches(batch: RolloutBatch, rows: Iterable[int], token_budget: int) -> list[list[int]]:
    """Cut rows into micro-batches, the longest rollouts first, so that little is padded.

    Args:
        batch: B rollouts.
        rows: those to cut; rollouts without a trained token are left out.
        token_budget: the most tokens of a micro-batch, padding included; a longer rollout is one of its own.

    Returns:
        Lists of rows; a rollout is never split.
    """
    lengths = batch.attention_mask.sum(dim=1).tolist()
    trained = batch.loss_mask.any(dim=1).tolist()
    parts: list[list[int]] = []
    for row in sorted((row for row in rows if trained[row]), key=lambda row: (-lengths[row], row)):
        if parts and lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= token_budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def deal_micro_batches(
    batch: RolloutBatch, rows: Iterable[int], token_budget: int, processes: Processes
) -> list[tuple[list[int], bool]]:
    """Cut rows into micro-batches and deal them out, smaller ones where there would be too few for all processes.

    Args:
        batch: B rollouts.
        rows: those to cut.
        token_budget: the most tokens of a micro-batch.
        processes: share the work.

    Returns:
        Micro-batches of this process, and whether each counts (see ``Processes.deal``).
    """
    rows = list(rows)
    if processes.size > 1:
        tokens = int(batch.attention_mask[rows].sum().item())
        token_budget = min(token_budget, -(-tokens // processes.size))
    return processes.deal(micro_batches(batch, rows, token_budget))


def mini_batches(batch: RolloutBatch, count: int, seed: int, step: int) -> list[list[int]]:
    """Cut a rollout batch into blocks of whole groups, in an order drawn from (seed, step).

    Args:
        batch: B rollouts.
        count: how many blocks; with fewer groups there are fewer blocks.
        seed: of the run.
        step: rollout step.

    Returns:
        Lists of rows; blocks without a trained token are left out.
    """
    groups = batch.group_ids.tolist()
    order = np.argsort(uniforms(DrawKey(seed, step, "mini-batches", 0, 0), max(groups) + 1), kind="stable")
    trained = batch.loss_mask.any(dim=1).tolist()
    blocks = [
        [row for row, group in enumerate(groups) if group in chosen]
        for chosen in map(set, np.array_split(order, count))
    ]
    return [block for block in blocks if any(trained[row] for row in block)]


def compute_logprobs(
    model: nn.Module,
    batch: RolloutBatch,
    token_budget: int,
    temperature: float,
    processes: Processes = ALONE,
) -> BatchLogprobs:
    """Log-probabilities and entropies of all trained tokens, without gradient.

    Args:
        model: the policy, or its reference.
        batch: B rollouts.
        token_budget: the most tokens of a micro-batch.
        temperature: of sampling.
        processes: share the work.

    Returns:
        Two tensors [B, T].
    """
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
    """Run the policy over one micro-batch, with gradient, and put together what the loss looks at.

    Args:
        model: the policy.
        ready: the rollout batch with advantages and old log-probabilities.
        rows: the micro-batch.
        temperature: of sampling.
        size: of the whole mini-batch.

    Returns:
        The N trained tokens of these rollouts.
    """
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


def stability_metrics(batch: RolloutBatch, before: BatchLogprobs, garbled_perplexity: float) -> Metrics:
    """Curves that tell whether training is stable, read off the policy before the update.

    Args:
        batch: B rollouts.
        before: log-probabilities and entropies of their tokens.
        garbled_perplexity: a rollout counts as garbled if one of its messages is more perplexing than this.

    Returns:
        entropy and perplexity over all policy tokens, the largest perplexity of a message, the share of garbled
        rollouts, and the drift between the engine's log-probabilities and the trainer's. Empty without a trained token.
    """
    mask = batch.loss_mask
    if not mask.any():
        return {}
    logprobs = before.policy[mask]
    drift = (batch.sampled_logprobs[mask] - logprobs).abs()
    perplexities = message_perplexities(before.policy, batch.turn_ids, mask)
    garbled = (perplexities > garbled_perplexity).any(dim=1)  # nan is not larger
    judged = perplexities[~perplexities.isnan()]
    metrics = {} if judged.numel() == 0 else {"stability/perplexity_max": judged.max().item()}
    return {
        **metrics,
        "stability/entropy": before.entropy[mask].mean().item(),
        "stability/perplexity": (-logprobs.mean()).exp().item(),
        "stability/garbled": garbled[mask.any(dim=1)].float().mean().item(),
        "stability/sampler_drift_mean": drift.mean().item(),
        "stability/sampler_drift_max": drift.max().item(),
    }


def _places(batch: RolloutBatch, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Indices (row, token) of the trained tokens of some rows, in the order of ``forward_logprobs``."""
    within, columns = batch.loss_mask[rows].nonzero(as_tuple=True)
    return torch.as_tensor(rows, device=within.device)[within], columns
