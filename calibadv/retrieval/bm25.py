"""Lexical search with BM25."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from calibadv.interfaces import Retriever
from calibadv.retrieval.corpus import read_corpus
from calibadv.types import ScoredDocument

# From this many documents on, indexing takes longer than about two seconds, so bm25s shows its progress bars.
_LARGE_CORPUS = 20_000


class BM25(Retriever):
    """Search by words, with BM25 (bm25s; Lucene's variant, k1 1.5, b 0.75) over title and text.

    Words are lower-cased and have at least two characters; there is no stemming. The index is built in memory.

    Args:
        corpus: JSON-lines file, plain or gzip, or ``embedded``.
        top_k: Documents that an episode asks for per search.
        stopwords: Words that are not searched for.

    Raises:
        ValueError: the corpus cannot be read or has no words, or ``top_k`` is below 1.
    """

    def __init__(self, corpus: str, top_k: int = 3, stopwords: Literal["english", "none"] = "english") -> None:
        check_top_k(top_k)
        self.top_k = top_k
        self._documents = read_corpus(corpus)
        self._stopwords: str | list[str] = "english" if stopwords == "english" else []
        self._index = self._build_index(corpus)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        """Find the best documents of each query.

        Args:
            queries: texts to search for.
            top_k: the most documents per query.

        Returns:
            One list per query, best first, ties in the order of the corpus. A query without a known word finds nothing.

        Raises:
            ValueError: ``top_k`` is below 1.
        """
        check_top_k(top_k)
        return [self._search_words(words, top_k) for words in self._tokenize(list(queries))]

    def _build_index(self, corpus: str) -> Any:
        import bm25s  # type: ignore[import-untyped]

        # bm25s sets its own logger to DEBUG when it is imported.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        large = len(self._documents) >= _LARGE_CORPUS
        words = self._tokenize([f"{d.title}\n{d.text}" for d in self._documents], show_progress=large)
        if not any(words):
            raise ValueError(f"corpus '{corpus}' has no word to search for; words have at least two characters")
        index = bm25s.BM25()
        index.index(words, show_progress=large)
        return index

    def _tokenize(self, texts: list[str], show_progress: bool = False) -> list[list[str]]:
        import bm25s

        words: list[list[str]] = bm25s.tokenize(
            texts, stopwords=self._stopwords, return_ids=False, show_progress=show_progress
        )
        return words

    def _search_words(self, words: list[str], top_k: int) -> list[ScoredDocument]:
        known = self._index.get_tokens_ids(words)
        if not known:
            return []
        scores: NDArray[np.float32] = self._index.get_scores_from_ids(known)
        return [ScoredDocument(self._documents[row], float(scores[row])) for row in best_rows(scores, top_k)]


def check_top_k(top_k: int) -> None:
    """Refuse a number of documents below 1.

    Args:
        top_k: documents per query.

    Raises:
        ValueError: ``top_k`` is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")


def best_rows(scores: NDArray[np.float32], top_k: int) -> list[int]:
    """Rows with the largest positive scores, best first, ties in the order of the rows.

    Args:
        scores: [N] one per document.
        top_k: the most rows.

    Returns:
        At most ``top_k`` row numbers.
    """
    rows = np.flatnonzero(scores > 0)
    if len(rows) > top_k:
        # bm25s' own selection breaks ties arbitrarily: keep every row that ties with the last one, then sort stably.
        threshold = np.partition(scores[rows], -top_k)[-top_k]
        rows = rows[scores[rows] >= threshold]
    order = np.argsort(-scores[rows], kind="stable")[:top_k]
    return [int(row) for row in rows[order]]
