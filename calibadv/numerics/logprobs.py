"""Log-probabilities and entropy, in float32 whatever the logits are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from calibadv.numerics.masked import check_shapes


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probability of each token under the softmax of its logits.

    Args:
        logits: [N, V], divided by the temperature.
        token_ids: [N] int64.

    Returns:
        [N] float32, with gradient.
    """
    check_shapes("N V, N", logits, token_ids)
    return -F.cross_entropy(logits.float(), token_ids, reduction="none")


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the full softmax, -sum p ln p.

    Args:
        logits: [N, V], divided by the temperature.

    Returns:
        [N] float32, in nats.
    """
    check_shapes("N V", logits)
    terms: Tensor = torch.special.entr(torch.softmax(logits.float(), dim=-1))
    return terms.sum(dim=-1)


def message_perplexities(logprobs: Tensor, turn_ids: Tensor, loss_mask: Tensor, min_tokens: int = 4) -> Tensor:
    """Perplexity of every message that is long enough to judge.

    Args:
        logprobs: [B, T], looked at where ``loss_mask`` is True.
        turn_ids: [B, T] turn of each policy token, -1 elsewhere.
        loss_mask: [B, T] bool.
        min_tokens: shorter messages get nan.

    Returns:
        [B, K] exp of the mean negative log-probability of each message; nan where there is none.
    """
    check_shapes("B T, B T, B T", logprobs, turn_ids, loss_mask)
    num_turns = int(turn_ids.max().item()) + 1
    turns = turn_ids.clamp(min=0)
    shape = (turn_ids.shape[0], max(num_turns, 1))
    zeros = logprobs.new_zeros(shape)
    counts = zeros.scatter_add(1, turns, loss_mask.to(logprobs))
    sums = zeros.scatter_add(1, turns, torch.where(loss_mask, -logprobs, 0.0))
    return torch.where(counts >= min_tokens, (sums / counts.clamp(min=1)).exp(), torch.nan)
