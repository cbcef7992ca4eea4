"""Intervals and tests of the comparison: pure functions of arrays, equal at every call.

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
_MOST_EXACT = 16
_SAMPLED_FLIPS = 100_000
_CHUNK_ENTRIES = 2_000_000


def bootstrap_interval(scores: Floats, resamples: int = RESAMPLES, level: float = LEVEL) -> Floats:
    """Percentile intervals of means, over seeds and questions at once.

    Every seed answers the same questions, so each resample draws S seeds and Q questions with replacement and takes
    the mean over both (the pigeonhole bootstrap, Owen 2007, arXiv 0712.1111). Arrays of equal shape see the same draws:
    differences of paired scores are given as such.
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


def interval_over_whole(scores: Floats) -> Floats:
    """Intervals over the questions that every run has answered."""
    whole = scores[:, :, np.isfinite(scores).all((0, 1))]
    if whole.shape[1] * whole.shape[2] < 2:
        return np.full((len(scores), 2), np.nan)
    return bootstrap_interval(whole)


def _weights(generator: np.random.Generator, count: int, size: int) -> Floats:
    """[count, size] how often each of ``size`` is drawn in ``size`` draws with replacement, over ``size``."""
    return generator.multinomial(size, np.full(size, 1 / size), count) / size


def sign_flip_test(differences: Floats) -> float:
    """Paired permutation test: could the mean difference be 0, each sign being as likely as the other?

    Exact, over all 2^S sign patterns, up to 16 seeds; above, over 100,000 patterns, which are the one observed and
    otherwise drawn.
    """
    seeds = len(differences)
    if seeds <= _MOST_EXACT:
        patterns = (np.arange(2**seeds)[:, None] >> np.arange(seeds)) & 1
    else:
        patterns = np.random.default_rng(0).integers(0, 2, (_SAMPLED_FLIPS, seeds))
        patterns[0] = 0
    sums = np.abs((1 - 2 * patterns) @ differences)
    tolerance = 1e-9 * np.abs(differences).sum()  # rounding must not tell equal sums apart
    return float(np.mean(sums >= np.abs(differences.sum()) - tolerance))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number, so that one false alarm among all is no likelier than in a single test.

    Holm 1979: the k-th smallest of m is multiplied by m - k + 1, and is at least as large as those before it.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def share_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score: of use for few trials and for shares of 0 and 1 too."""
    z = 1.959964
    centre = (count + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * np.sqrt(count * (total - count) / total + z * z / 4)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def smallest_p(seeds: int) -> float:
    """The smallest p value that ``sign_flip_test`` can give."""
    return 2.0 / 2**seeds if seeds <= _MOST_EXACT else 1.0 / _SAMPLED_FLIPS
