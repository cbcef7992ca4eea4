"""Intervals and tests of the comparison, against samples small enough to enumerate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binomtest, permutation_test

from calibadv.analysis.statistics import (
    bootstrap_interval,
    holm_correction,
    sign_flip_test,
    smallest_p,
    wilson_interval,
)

tables = arrays(float, (1, 3, 4), elements=st.floats(0, 1, width=16))


def interval(scores: list[list[float]], level: float = 0.95) -> list[float]:
    return bootstrap_interval(np.array([scores]), level=level)[0].tolist()


@pytest.mark.parametrize("scores", [[[0.0], [1.0]], [[0.0, 1.0]]])
def test_two_seeds_or_two_questions(scores: list[list[float]]) -> None:
    # Two draws of {0, 1}: the mean is 0, 0.5 or 1 with probability 1/4, 1/2, 1/4. The 2.5 % and 97.5 % points are 0
    # and 1; the 30 % and 70 % points both 0.5.
    assert interval(scores) == [0, 1]
    assert interval(scores, level=0.4) == [0.5, 0.5]


def test_seeds_and_questions_are_both_drawn() -> None:
    # Score = seed effect + question effect, each 0 or 1. The mean is the sum of two independent means of two draws, so
    # it is 0 with probability 1/16, 1/2 with 4/16, 1 with 6/16, 3/2 with 4/16, 2 with 1/16.
    scores = [[0.0, 1.0], [1.0, 2.0]]
    assert interval(scores, level=0.90) == [0, 2]  # 5 % < 1/16
    assert interval(scores, level=0.80) == [0.5, 1.5]  # 1/16 < 10 % < 5/16
    assert interval(scores, level=0.20) == [1, 1]  # 5/16 < 40 %


def test_many_questions_give_the_interval_of_the_central_limit_theorem() -> None:
    scores = np.random.default_rng(1).random((1, 1, 500))
    half = 1.96 * scores.std() / np.sqrt(500)
    low, high = bootstrap_interval(scores)[0]
    assert high - low == pytest.approx(2 * half, rel=0.05)


def test_seeds_that_agree_do_not_narrow_the_interval_over_questions() -> None:
    # The same answers three times are no more evidence than once, as if questions were drawn anew for each seed.
    scores = np.random.default_rng(2).random((1, 1, 200))
    once = np.diff(bootstrap_interval(scores)[0])
    thrice = np.diff(bootstrap_interval(np.repeat(scores, 3, axis=1))[0])
    assert thrice == pytest.approx(once, rel=0.05)


def test_one_score_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two seeds or two questions"):
        bootstrap_interval(np.array([[[0.5]]]))


@given(tables, st.floats(-1, 1, width=16))
def test_the_interval_moves_with_the_scores_and_stays_within_them(scores: np.ndarray, shift: float) -> None:
    low, high = bootstrap_interval(scores, resamples=200)[0]
    assert scores.min() - 1e-9 <= low <= high <= scores.max() + 1e-9
    assert bootstrap_interval(scores + shift, resamples=200)[0] == pytest.approx([low + shift, high + shift], abs=1e-9)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3], 2 / 8),  # |sum| reaches 6 with all signs equal only
        ([3, 1, -1], 6 / 8),  # |sum| reaches 3 with 3+1+1, 3+1-1, 3-1+1 and their negatives
        ([1, 2, -3], 1),  # every |sum| reaches 0
        ([0, 0], 1),
        ([0.1, 0.2, 0.3, -0.6 + 0.6], 4 / 16),  # a difference of 0 doubles every pattern
    ],
)
def test_sign_flips_counted_by_hand(differences: list[float], p: float) -> None:
    assert sign_flip_test(np.array(differences, dtype=float)) == p


def test_sums_that_are_equal_but_for_rounding_are_equal() -> None:
    # 0.1 + 0.2 - 0.3 is 0 and not 5.6e-17: all eight patterns reach the observed sum of 0.
    assert sign_flip_test(np.array([0.1, 0.2, -0.3])) == 1


@given(arrays(float, 7, elements=st.integers(-50, 50).map(float)))
def test_the_p_value_is_scipys(differences: np.ndarray) -> None:
    result = permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=2**7, vectorized=True)
    assert sign_flip_test(differences) == pytest.approx(result.pvalue)


@given(arrays(float, 6, elements=st.floats(0.01, 1)))
def test_seeds_that_all_agree_give_the_smallest_p(differences: np.ndarray) -> None:
    assert sign_flip_test(differences) == sign_flip_test(-differences) == smallest_p(6) == 2 / 64


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([], []),
        ([0.03], [0.03]),
        # Sorted 0.01, 0.03, 0.04: times 3, 2 and 1 they are 0.03, 0.06 and 0.04, which may not be below 0.06.
        ([0.04, 0.01, 0.03], [0.06, 0.03, 0.06]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holms_correction_by_hand(p_values: list[float], corrected: list[float]) -> None:
    assert holm_correction(p_values) == pytest.approx(corrected)


@given(st.lists(st.floats(0, 1)))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float]) -> None:
    rejected: set[int] = set()
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] * (len(p_values) - rank) > 0.05:
            break
        rejected.add(place)
    assert {place for place, p in enumerate(holm_correction(p_values)) if p <= 0.05} == rejected


@pytest.mark.parametrize("total", [1, 2, 10, 37])
def test_the_interval_of_a_proportion_is_scipys(total: int) -> None:
    for count in range(total + 1):
        expected = binomtest(count, total).proportion_ci(method="wilson")
        assert wilson_interval(count, total) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_more_seeds_than_can_be_enumerated() -> None:
    agreeing = sign_flip_test(np.ones(20))
    assert smallest_p(20) <= agreeing < 1e-4  # 2 / 2**20 of the patterns, and the observed one
    mixed = np.array([1.0, -1.0] * 10 + [0.5])
    assert sign_flip_test(mixed) > 0.5
