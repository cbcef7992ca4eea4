from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest

from calibadv.numerics.rng import keyed_generator, keyed_uniforms
from calibadv.types import DrawKey

KEY = DrawKey(seed=1, step=2, question_id="q", sample=3, turn=4)


def philox4x64(counter: int, key: int) -> list[int]:
    """One block of Philox4x64-10, from its paper (Salmon et al. 2011)."""
    word = (1 << 64) - 1
    block, (low, high) = [counter, 0, 0, 0], (key & word, key >> 64)
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * block[0], 0xCA5A826395121157 * block[2]
        block = [(right >> 64) ^ block[1] ^ low, right & word, (left >> 64) ^ block[3] ^ high, left & word]
        low, high = (low + 0x9E3779B97F4A7C15) & word, (high + 0xBB67AE8584CAA73B) & word
    return block


def test_uniforms_are_the_top_bits_of_philox_keyed_by_blake2b() -> None:
    key = int.from_bytes(blake2b(b'[1, 2, "q", 3, 4]', digest_size=16).digest(), "little")
    raw = philox4x64(1, key) + philox4x64(2, key)  # NumPy counts from 1
    assert keyed_uniforms(KEY, 8).tolist() == [(bits >> 40) / 2**24 for bits in raw]
    assert keyed_uniforms(KEY, 2).dtype == np.float32
    assert keyed_uniforms(KEY, 2).tolist() == pytest.approx([0.3733883, 0.8575943])  # and so on every machine


def test_a_longer_call_begins_with_the_same_numbers() -> None:
    assert keyed_uniforms(KEY, 100)[:7].tolist() == keyed_uniforms(KEY, 7).tolist()
    assert keyed_uniforms(KEY, 0).tolist() == []


@pytest.mark.parametrize(
    "other",
    [
        DrawKey(0, 2, "q", 3, 4),
        DrawKey(1, 3, "q", 3, 4),
        DrawKey(1, 2, "q2", 3, 4),
        DrawKey(1, 2, "q", 4, 4),
        DrawKey(1, 2, "q", 3, 5),
        DrawKey(1, 2, "q\ud800", 3, 4),
    ],
)
def test_every_field_of_the_key_counts(other: DrawKey) -> None:
    assert keyed_uniforms(other, 8).tolist() != keyed_uniforms(KEY, 8).tolist()


@pytest.mark.parametrize(
    ("left", "right"), [(("ab", "c"), ("a", "bc")), (("1", 2), (1, 2)), ((1, 23), (12, 3)), (('a", "b',), ("a", "b"))]
)
def test_fields_of_a_key_are_kept_apart(left: tuple, right: tuple) -> None:
    assert keyed_generator(*left).random_raw() != keyed_generator(*right).random_raw()


def test_uniforms_are_uniform() -> None:
    values = keyed_uniforms(KEY, 40_000)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    # each tenth holds 4000 on average, with standard deviation 60: six of them
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    assert abs(counts - 4000).max() < 360
