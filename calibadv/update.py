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

from calibadv.interfaces import LossInputs, Metrics
from calibadv.numerics.draws import uniforms
from calibadv.numerics.logprobs import entropy, token_logprobs
from calibadv.numerics.perplexity import message_perplexities
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
        [row for row, group in enumerate(groups) if group in set(block)] for block in np.array_split(order, count)
    ]
    return [block for block in blocks if any(trained[row] for row in block)]


def forward_logits(
    model: nn.Module, batch: RolloutBatch, rows: Sequence[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """Run the model over some rollouts.

    Args:
        model: a causal language model.
        batch: B rollouts.
        rows: those to run.
        temperature: the logits are divided by it, as when the tokens were sampled.

    Returns:
        Logits [N, V] of the trained tokens of these rollouts, row by row, and the tokens [N] themselves.
    """
    length = int(batch.attention_mask[rows].sum(dim=1).max().item())
    token_ids = batch.token_ids[rows, :length]
    mask = batch.loss_mask[rows, 1:length]
    # Padding is on the right, where a causal model does not look: without a mask, attention takes its fast path.
    output = model(input_ids=token_ids, use_cache=False)
    return output.logits[:, :-1][mask] / temperature, token_ids[:, 1:][mask]


def compute_logprobs(model: nn.Module, batch: RolloutBatch, token_budget: int, temperature: float) -> BatchLogprobs:
    """Log-probabilities and entropies of all trained tokens, without gradient.

    Args:
        model: the policy, or its reference.
        batch: B rollouts.
        token_budget: the most tokens of a micro-batch.
        temperature: of sampling.

    Returns:
        Two tensors [B, T].
    """
    logprobs = torch.zeros_like(batch.sampled_logprobs)
    entropies = torch.zeros_like(batch.sampled_logprobs)
    with torch.no_grad():
        for rows in micro_batches(batch, range(len(batch.rollouts)), token_budget):
            logits, tokens = forward_logits(model, batch, rows, temperature)
            places = _places(batch, rows)
            logprobs[places] = token_logprobs(logits, tokens)
            entropies[places] = entropy(logits)
    return BatchLogprobs(logprobs, entropies)


def loss_inputs(
    model: nn.Module, ready: ReadyBatch, rows: Sequence[int], temperature: float, denominator: float
) -> LossInputs:
    """Run the policy over one micro-batch, with gradient, and put together what the loss looks at.

    Args:
        model: the policy.
        ready: the rollout batch with advantages and old log-probabilities.
        rows: the micro-batch.
        temperature: of sampling.
        denominator: trained tokens of the whole mini-batch.

    Returns:
        The N trained tokens of these rollouts.
    """
    logits, tokens = forward_logits(model, ready.batch, rows, temperature)
    places = _places(ready.batch, rows)
    reference = ready.before.reference
    return LossInputs(
        logprobs=token_logprobs(logits, tokens),
        old_logprobs=ready.before.policy[places],
        reference_logprobs=None if reference is None else reference[places],
        advantages=ready.advantages[places],
        denominator=denominator,
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
    """Indices (row, token) of the trained tokens of some rows, in the order of ``forward_logits``."""
    within, columns = batch.loss_mask[rows].nonzero(as_tuple=True)
    return torch.as_tensor(rows, device=within.device)[within], columns
