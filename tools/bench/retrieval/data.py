"""Made-up passages, queries and vectors for ``bench.py``; everything is a function of a seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DIMENSION = 384
_VOCABULARY, _PASSAGE_WORDS, _TITLE_WORDS, _QUERY_WORDS = 500_000, 100, 3, 12
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstv" for vowel in "aeiou"]
_BLOCK = 1 << 13
# Vectors of a first topic; shares of it, of a second topic, and of what is a vector's own.
_TOPIC_SIZE, _SHARES = 100, (0.4, 0.3, 0.3)


class Words:
    """Words that occur as often as those of English do (Zipf and Mandelbrot: 1 / (rank + 2.7)).

    The most frequent ones are bm25s's English stop-words.
    """

    def __init__(self) -> None:
        from bm25s.stopwords import STOPWORDS_EN

        made = [_spell(number) for number in range(_VOCABULARY - len(STOPWORDS_EN))]
        self._stopwords = len(STOPWORDS_EN)
        self._words = np.array([*STOPWORDS_EN, *made], object)
        self._cumulated = np.cumsum(1 / (np.arange(_VOCABULARY) + 2.7))
        self._cumulated /= self._cumulated[-1]

    def draw(self, rng: np.random.Generator, rows: int, words: int, stopwords: bool = True) -> list[list[str]]:
        """Draw ``rows`` texts of so many words each."""
        lowest = 0.0 if stopwords else self._cumulated[self._stopwords - 1]
        ranks = np.searchsorted(self._cumulated, rng.uniform(lowest, 1, (rows, words)))
        drawn: list[list[str]] = self._words[ranks].tolist()
        return drawn


def _spell(number: int) -> str:
    """Syllables in the place of digits, at least two: another word for each number."""
    syllables = []
    while number or len(syllables) < 2:
        number, digit = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[digit])
    return "".join(syllables)


def write_corpus(path: Path, passages: int, seed: int = 0) -> None:
    """Write JSON lines in Search-R1's form, 100 words a passage, as wiki-18 has them."""
    words, rng = Words(), np.random.default_rng([seed, 0])
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, passages, _BLOCK):
            drawn = words.draw(rng, min(_BLOCK, passages - start), _TITLE_WORDS + _PASSAGE_WORDS)
            for row, text in enumerate(drawn, start):
                title, body = " ".join(text[:_TITLE_WORDS]), " ".join(text[_TITLE_WORDS:])
                file.write(json.dumps({"id": str(row), "contents": f'"{title}"\n{body}.'}) + "\n")


def make_queries(count: int, seed: int = 0) -> list[str]:
    """Draw queries of as many words beside stop-words as HotpotQA's questions have."""
    drawn = Words().draw(np.random.default_rng([seed, 1]), count, _QUERY_WORDS, stopwords=False)
    return [" ".join(words) for words in drawn]


class Vectors:
    """Vectors of length 1, each between two topics, so that neighbours lie in several lists of an index.

    They are spread over their dimensions as MiniLM's vectors of HotpotQA's passages are.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        self._seed = seed
        rng = np.random.default_rng([seed, 2])
        places = np.arange(DIMENSION)
        # Singular values of MiniLM's vectors, to within a tenth of the largest.
        self._spread = ((1 + places / 2) ** -0.25 * np.exp(-places / 300)).astype(np.float32)
        self._rotation = np.linalg.qr(rng.standard_normal((DIMENSION, DIMENSION)))[0].astype(np.float32)
        self._topics = self._draw(rng, max(1, count // _TOPIC_SIZE))
        self._count = count

    def _draw(self, rng: np.random.Generator, count: int) -> NDArray[np.float32]:
        return _normalised((rng.standard_normal((count, DIMENSION), np.float32) * self._spread) @ self._rotation)

    def _of_topics(self, rng: np.random.Generator, count: int) -> NDArray[np.float32]:
        first, second = (self._topics[rng.integers(0, len(self._topics), count)] for _ in range(2))
        parts = zip(_SHARES, (first, second, self._draw(rng, count)), strict=True)
        return _normalised(np.sum([share**0.5 * part for share, part in parts], axis=0))

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield all ``count`` vectors, some thousands at a time."""
        rng = np.random.default_rng([self._seed, 3])
        for start in range(0, self._count, _BLOCK):
            yield self._of_topics(rng, min(_BLOCK, self._count - start))

    def queries(self, count: int) -> NDArray[np.float32]:
        """Draw further vectors of the same topics."""
        return self._of_topics(np.random.default_rng([self._seed, 4]), count)


def _normalised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    normalised: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalised
