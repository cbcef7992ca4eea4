"""Random draws that depend on a key and on nothing that was drawn before."""

from __future__ import annotations

import json
from dataclasses import astuple
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from calibadv.types import DrawKey


def keyed_stream(*fields: int | str) -> np.random.Philox:
    """A counter-based stream of random bits, the same for the same fields on every machine.

    Args:
        *fields: what the draws depend on. ``("1", 2)`` and ``(1, 2)`` are different keys.

    Returns:
        A Philox bit generator, keyed by the 128-bit BLAKE2b of the fields.
    """
    return np.random.Philox(key=int.from_bytes(_digest(*fields), "little"))


def request_seed(key: DrawKey) -> int:
    """The seed of a turn for engines with a sampler of their own.

    Args:
        key: seed, rollout step, question, sample and turn.

    Returns:
        The first 63 bits of the key's digest: a seed that a signed 64-bit integer holds.
    """
    return int.from_bytes(_digest(*astuple(key))[:8], "big") >> 1


def _digest(*fields: int | str) -> bytes:
    # JSON keeps where a field ends and whether it was a number; Python's hash() differs from process to process.
    return blake2b(json.dumps(fields).encode(), digest_size=16).digest()


def uniforms(key: DrawKey, n: int) -> NDArray[np.float32]:
    """The first ``n`` uniforms of a turn; the n-th one decides its n-th token.

    Made from raw bits, whose sequence NumPy guarantees across versions.

    Args:
        key: seed, rollout step, question, sample and turn.
        n: how many.

    Returns:
        [n] float32 in [0, 1), multiples of 2^-24; a longer call begins with the same numbers.
    """
    raw = np.asarray(keyed_stream(*astuple(key)).random_raw(n), dtype=np.uint64)
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
