"""Log-probabilities and entropy, in float32 whatever the logits are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from calibadv.numerics.shapes import check_shapes


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
