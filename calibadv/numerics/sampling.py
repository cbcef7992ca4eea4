"""Draw tokens from logits by the inverse of their cumulative distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.errors import UserError
from calibadv.numerics.shapes import check_shapes


def draw_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row from softmax(logits / temperature), over the whole vocabulary.

    A draw depends on its own row and uniform alone, so that it does not matter which other rows share the batch.

    Args:
        logits: [N, V], float32.
        temperature: 0 takes the most likely token, the first of equals; log-probabilities are then those at 1.
        uniforms: [N] in [0, 1).

    Returns:
        Token ids [N] and their log-probabilities [N].

    Raises:
        UserError: a row of logits has no distribution (it holds nan, or plus infinity).
    """
    check_shapes("N V, N", logits, uniforms)
    if temperature not in (0, 1):
        logits = logits / temperature
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    if not normaliser.isfinite().all():
        raise UserError(
            f"the policy's logits are not finite at temperature {temperature}: training has diverged; "
            "resume from an earlier checkpoint with a lower model.learning_rate"
        )
    if temperature > 0:
        cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)
        # The sum is 1 only up to rounding; a target below it always meets a token of probability above 0.
        total = cumulative[:, -1:]
        target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, target, right=True)
    else:
        tokens = logits.argmax(dim=-1, keepdim=True)
    return tokens[:, 0], (logits.gather(1, tokens) - normaliser)[:, 0]
