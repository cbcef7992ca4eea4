"""Which documents have each word, and what it is worth there: a BM25 index, built block by block.

bm25s builds an index of lists of words of the whole corpus; here a block of documents at a time is numbers, so that
millions of documents can be indexed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class _Block:
    """P pairs of a word and a document that has it, sorted by word and document.

    Attributes:
        words: the W different words.
        runs: [W] documents of each word.
        rows: [P] the documents.
        counts: [P] how often.
    """

    words: NDArray[np.int64]
    runs: NDArray[np.int64]
    rows: NDArray[np.int32]
    counts: NDArray[np.int32]


class Postings:
    """Words of documents, added in the order of the rows.

    Attributes:
        vocabulary: number of each word, in the order of their first appearance.
    """

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}
        self._lengths: list[NDArray[np.int64]] = []
        self._documents = 0
        self._blocks: list[_Block] = []

    def add(self, texts: Sequence[Sequence[str]]) -> None:
        """Add the next documents.

        Args:
            texts: words of each.
        """
        numbers = self.vocabulary
        words = np.fromiter((numbers.setdefault(word, len(numbers)) for text in texts for word in text), np.int64)
        lengths = np.fromiter(map(len, texts), np.int64)
        rows = np.repeat(np.arange(self._documents, self._documents + len(texts)), lengths)
        pairs, counts = np.unique(words << 32 | rows, return_counts=True)
        different, runs = np.unique(pairs >> 32, return_counts=True)
        rows = (pairs & 0xFFFFFFFF).astype(np.int32)
        self._blocks.append(_Block(different, runs, rows, counts.astype(np.int32)))
        self._lengths.append(lengths)
        self._documents += len(texts)

    def scores(self, k1: float, b: float) -> dict[str, Any]:
        """What each word adds to the score of each document that has it. Uses the postings up.

        Lucene's BM25 (Kamphuis et al. 2020, "Which BM25 Do You Mean?", without the constant factor k1 + 1): for a word
        in n of N documents, c times in one of length l where the mean length is m, it is
        log(1 + (N - n + 0.5) / (n + 0.5)) c / (c + k1 (1 - b + b l / m)).

        Args:
            k1: how soon more occurrences stop to count.
            b: how much long documents are discounted, in [0, 1].

        Returns:
            ``data``, ``indices``, ``indptr`` (float32 and rows of a word w from indptr[w] to indptr[w + 1], ascending)
            and ``num_docs``: what ``bm25s.BM25.scores`` holds.
        """
        having = np.zeros(len(self.vocabulary), np.int64)
        for block in self._blocks:
            having[block.words] += block.runs
        # Rounded to float32 where bm25s rounds, so that both give the same scores.
        idf = np.log(1 + (self._documents - having + 0.5) / (having + 0.5)).astype(np.float32)
        lengths = np.concatenate(self._lengths)
        norms = k1 * ((1 - b) + b * lengths / lengths.mean())
        starts = np.concatenate([[0], np.cumsum(having)])
        data, indices = np.empty(starts[-1], np.float32), np.empty(starts[-1], np.int32)
        free = starts[:-1].copy()
        self._blocks.reverse()
        while self._blocks:
            block = self._blocks.pop()
            before = np.cumsum(block.runs) - block.runs
            places = np.repeat(free[block.words] - before, block.runs) + np.arange(len(block.rows))
            data[places] = np.repeat(idf[block.words], block.runs) * (block.counts / (norms[block.rows] + block.counts))
            indices[places] = block.rows
            free[block.words] += block.runs
        return {"data": data, "indices": indices, "indptr": starts, "num_docs": self._documents}
