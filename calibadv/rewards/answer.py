"""Answer scores: token F1, exact match and cover match, each the best over the golden answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from typing_extensions import override

from calibadv.interfaces import Reward
from calibadv.types import Question

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Lower-case, drop ASCII punctuation, drop the words a, an and the, collapse white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(prediction: str, golden_answers: Sequence[str]) -> float:
    """Token F1: the harmonic mean of precision and recall over token multisets.

    Written as 2 x shared / (predicted + golden), which needs one division: equal answers score equally to the last bit,
    and the silver threshold is met exactly where the fraction meets it.
    """
    predicted = Counter(normalise_answer(prediction).split())
    return max(_token_f1(predicted, Counter(normalise_answer(golden).split())) for golden in golden_answers)


def _token_f1(predicted: Counter[str], golden: Counter[str]) -> float:
    shared = (predicted & golden).total()
    return 2 * shared / (predicted.total() + golden.total()) if shared else 0.0


def exact_match(prediction: str, golden_answers: Sequence[str]) -> float:
    """Return True if the normalised prediction equals a normalised golden answer."""
    predicted = normalise_answer(prediction)
    return float(any(normalise_answer(golden) == predicted for golden in golden_answers))


def cover_match(prediction: str, golden_answers: Sequence[str]) -> float:
    """Return True if a normalised golden answer is a substring of the normalised prediction.

    Plain substrings, as published: ``"art"`` covers in ``"party"``, and a golden answer that normalises to nothing
    (``"A"``) covers in everything.
    """
    predicted = normalise_answer(prediction)
    return float(any(normalise_answer(golden) in predicted for golden in golden_answers))


class F1(Reward):
    """Token F1 with the nearest golden answer."""

    @override
    def score(self, answer: str, question: Question) -> float:
        return f1(answer, question.golden_answers)


class ExactMatch(Reward):
    """1 for an answer that equals a golden answer after normalisation, else 0."""

    @override
    def score(self, answer: str, question: Question) -> float:
        return exact_match(answer, question.golden_answers)


class CoverMatch(Reward):
    """1 for an answer that contains a golden answer after normalisation, else 0."""

    @override
    def score(self, answer: str, question: Question) -> float:
        return cover_match(answer, question.golden_answers)
