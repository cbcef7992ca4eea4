"""Keyed random numbers: each draw depends on its key alone, and not on the draws before it."""

from __future__ import annotations

import json
from dataclasses import astuple
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibadv.errors import UserError
from calibadv.numerics.masked import check_shapes
from calibadv.types import DrawKey


def keyed_generator(*fields: int | str) -> np.random.Philox:
    """A counter-based generator of random bits, the same for the same fields on every machine.

    Args:
        *fields: what the draws depend on. ``("1", 2)`` and ``(1, 2)`` are different keys.

    Returns:
        A Philox bit generator, keyed by the 128-bit BLAKE2b of the fields.
    """
    return np.random.Philox(key=int.from_bytes(_digest(*fields), "little"))


def keyed_uniforms(key: DrawKey, n: int) -> NDArray[np.float32]:
    """The first ``n`` uniforms of a key; in a turn the n-th one decides the n-th token.

    Made from raw bits, whose sequence NumPy guarantees across versions.

    Args:
        key: seed, rollout step, question, sample and turn.
        n: how many.

    Returns:
        [n] float32 in [0, 1), multiples of 2^-24; a longer call begins with the same numbers.
    """
    raw = np.asarray(keyed_generator(*astuple(key)).random_raw(n), dtype=np.uint64)
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def request_seed(key: DrawKey) -> int:
    """The seed of a turn for engines with a sampler of their own.

    Args:
        key: seed, rollout step, question, sample and turn.

    Returns:
        The first 63 bits of the key's digest: a seed that a signed 64-bit integer holds.
    """
    return int.from_bytes(_digest(*astuple(key))[:8], "big") >> 1


def draw_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row from softmax(logits / temperature), over the whole vocabulary.

    By the inverse of the cumulative distribution. A draw depends on its own row and uniform alone, and not on the other
    rows of the batch.

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


def _digest(*fields: int | str) -> bytes:
    # JSON keeps where a field ends and whether it was a number; Python's hash() differs from process to process.
    return blake2b(json.dumps(fields).encode(), digest_size=16).digest()
