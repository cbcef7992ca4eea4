"""Intervals and tests of the comparison: deterministic functions of arrays.

Shapes: **S** seeds, **Q** questions, **M** measures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calibadv.errors import UserError

Floats = NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
_MAX_EXACT_SEEDS = 16
_SAMPLED_PATTERNS = 100_000
_CHUNK_ENTRIES = 2_000_000


def bootstrap_interval(scores: Floats, resamples: int = RESAMPLES, level: float = LEVEL) -> Floats:
    """Percentile bootstrap intervals of means over seeds and questions.

    Every seed answers the same questions, so each resample draws S seeds and Q questions with replacement and takes
    the mean over both (the pigeonhole bootstrap, Owen 2007, arXiv 0712.1111). The draws depend on the shape only. For
    paired scores, pass their differences.

    Args:
        scores: [M, S, Q] finite.
        resamples: number of resamples.
        level: coverage.

    Returns:
        [M, 2] lower and upper ends.

    Raises:
        UserError: if there is a single score.
    """
    measures, seeds, questions = scores.shape
    if seeds * questions < 2:
        raise UserError("one score has no interval; give at least two seeds or two questions")
    generator = np.random.default_rng(0)
    means = np.empty((measures, resamples))
    chunk = max(1, _CHUNK_ENTRIES // questions)
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        by_seed = _weights(generator, count, seeds)
        by_question = _weights(generator, count, questions)
        for measure in range(measures):
            means[measure, start : start + count] = ((by_seed @ scores[measure]) * by_question).sum(1)
    tail = (1 - level) / 2
    return np.quantile(means, [tail, 1 - tail], axis=1).T


def bootstrap_complete_cases(scores: Floats) -> Floats:
    """Return the intervals over the questions that have a score in every run; NaN if fewer than two scores are left."""
    complete = scores[:, :, np.isfinite(scores).all((0, 1))]
    if complete.shape[1] * complete.shape[2] < 2:
        return np.full((len(scores), 2), np.nan)
    return bootstrap_interval(complete)


def _weights(generator: np.random.Generator, count: int, size: int) -> Floats:
    """[count, size] frequencies of the items in ``size`` draws with replacement."""
    return generator.multinomial(size, np.full(size, 1 / size), count) / size


def sign_flip_test(differences: Floats) -> float:
    """Return the two-sided p value of the paired permutation test that the mean difference is 0.

    Under the null hypothesis both signs of each difference are equally likely. Exact, over all 2^S sign patterns, up to
    16 seeds; above, over the observed pattern and 99,999 random ones.

    Args:
        differences: [S] one per seed.

    Returns:
        The p value, in (0, 1].
    """
    seeds = len(differences)
    if seeds <= _MAX_EXACT_SEEDS:
        patterns = (np.arange(2**seeds)[:, None] >> np.arange(seeds)) & 1
    else:
        patterns = np.random.default_rng(0).integers(0, 2, (_SAMPLED_PATTERNS, seeds))
        patterns[0] = 0
    sums = np.abs((1 - 2 * patterns) @ differences)
    tolerance = 1e-9 * np.abs(differences).sum()  # sums that are equal but for rounding count as equal
    return float(np.mean(sums >= np.abs(differences.sum()) - tolerance))


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Correct p values for multiple testing: the family-wise error rate stays that of a single test.

    Holm 1979: the k-th smallest of m is multiplied by m - k + 1, and is at least as large as those before it.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion, which also suits few trials and proportions of 0 and 1."""
    z = 1.959964  # the 97.5 % quantile of the normal distribution
    centre = (count + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * np.sqrt(count * (total - count) / total + z * z / 4)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def smallest_p(seeds: int) -> float:
    """Return the smallest p value that ``sign_flip_test`` can give with so many seeds."""
    return 2.0 / 2**seeds if seeds <= _MAX_EXACT_SEEDS else 1.0 / _SAMPLED_PATTERNS
