"""One forward pass over some rollouts, without ever holding the logits of all their tokens.

The logits of a micro-batch are what fills memory: [T, V] in float32 takes 2.5 GB for 4,096 tokens of a vocabulary of
152,000. So the model's head is applied to the trained tokens only, some of them at a time, and in a pass with gradient
their logits are computed again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from calibadv.batch import RolloutBatch
from calibadv.numerics.logprobs import entropy, token_logprobs

# Logits held at a time: 128 MB in float32.
LOGITS_AT_ONCE = 2**25


def forward_logprobs(
    model: nn.Module, batch: RolloutBatch, rows: Sequence[int], temperature: float, logits_at_once: int = LOGITS_AT_ONCE
) -> tuple[Tensor, Tensor]:
    """Run the model over some rollouts."""
    length = int(batch.attention_mask[rows].sum(dim=1).max().item())
    token_ids = batch.token_ids[rows, :length]
    mask = batch.loss_mask[rows, 1:length]
    states, head = _last_states(model, token_ids)
    tokens = token_ids[:, 1:][mask]
    states = states[:, :-1][mask]

    with_gradient = torch.is_grad_enabled()

    def judge(some: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(some).float() / temperature
        return token_logprobs(logits, drawn), logits.new_zeros(len(drawn)) if with_gradient else entropy(logits)

    size = max(1, logits_at_once // _vocabulary(head, states))
    parts = list(zip(torch.split(states, size), torch.split(tokens, size), strict=True))
    if with_gradient and len(parts) > 1:
        judged = [checkpoint(judge, *part, use_reentrant=False) for part in parts]
    else:
        judged = [judge(*part) for part in parts]
    logprobs, entropies = zip(*judged, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _last_states(model: nn.Module, token_ids: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The model's states [B, T, H] before its head, and the head; or its logits where the head is not all there is.

    The head is called by the model itself, for sharded parameters are only there during the call, but sees one token of
    each row. If these logits are not what the head makes of the states, the model changes them afterwards (a soft cap,
    a scale), and only it can compute them.
    """
    # Padding is on the right, where a causal model does not look: without a mask, attention takes its fast path.
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    if isinstance(head, nn.Module):
        seen: list[Tensor] = []

        def keep_one(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(arguments[0])
            return (arguments[0][:, :1], *arguments[1:])

        with head.register_forward_pre_hook(keep_one):
            logits = model(input_ids=token_ids, use_cache=False).logits
        (states,) = seen
        with torch.no_grad():
            alone = head(states[:, :1])
        if torch.equal(logits.nan_to_num(), alone.nan_to_num()):  # a policy that has diverged is told of elsewhere
            return states, head
    logits = model(input_ids=token_ids, use_cache=False).logits
    return logits, nn.Identity()


def _vocabulary(head: Callable[[Tensor], Tensor], states: Tensor) -> int:
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else int(states.shape[-1])
