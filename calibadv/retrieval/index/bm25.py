"""Which documents have each word, and what it is worth there: a BM25 index, built block by block.

bm25s builds an index of lists of words of the whole corpus; here a block of documents at a time is numbers, so that
millions of documents can be indexed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibadv.errors import UserError, one_line
from calibadv.io.progress_bar import blocks
from calibadv.retrieval.corpus.base import searched_text
from calibadv.retrieval.index.manifest import INDEX_NAMES
from calibadv.types import Document


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
        """Add the next documents."""
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


# Documents whose words are held as text at a time.
_BLOCK = 1 << 13


_LANGUAGES = (
    "english, german, dutch, french, spanish, portuguese, italian, russian, swedish, norwegian, chinese, turkish, "
    "korean, danish"
)


def build_bm25(
    documents: Sequence[Document], stopwords: str | list[str], stemmer: str | None, show_progress: bool
) -> Any:
    """Index documents. Texts are read in blocks; at its peak this needs about 20 bytes per word and document."""
    bm25s = _import_bm25s()
    tokenize_words([], stopwords, stemmer)  # refuses unknown names before anything is read
    postings = Postings()
    for block in blocks(documents, _BLOCK, "Indexing the corpus", hidden=not show_progress):
        postings.add(tokenize_words([searched_text(document) for document in block], stopwords, stemmer))
    if not postings.vocabulary:
        raise UserError("the corpus has no word to search for; words have at least two characters and no stop-words")
    index = bm25s.BM25()
    index.scores = postings.scores(index.k1, index.b)
    index.vocab_dict = postings.vocabulary
    index.nonoccurrence_array = None  # of other variants
    return index


def save_bm25(index: Any, folder: Path) -> None:
    """Write an index: three arrays of numpy, and two JSON files."""
    index.save(folder, allow_pickle=False, show_progress=False)
    for name in ("data", "indices", "indptr"):
        # numpy, which writes them, does not notice where the last bytes find no space.
        try:
            np.load(folder / f"{name}.csc.index.npy", mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise OSError(f"{name}.csc.index.npy was cut off, as on a full disk") from error


def load_bm25(folder: Path, documents: int) -> Any:
    """Open an index of ``save_bm25``, memory-mapped."""
    bm25s = _import_bm25s()
    try:
        index = bm25s.BM25.load(folder / INDEX_NAMES["bm25"], mmap=True, allow_pickle=False)
        stored = index.scores
        whole = len(stored["data"]) == len(stored["indices"]) == stored["indptr"][-1]
        if not whole or stored["num_docs"] != documents or len(index.vocab_dict) != len(stored["indptr"]) - 1:
            raise UserError("its files do not belong together")
    except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError) as error:
        # numpy takes whatever is no array of its own for a pickle, and says how to load that.
        reason = "one of its arrays is damaged" if "pickle" in str(error) else one_line(error)
        raise UserError(
            f"index '{folder}' does not load ({reason}); copy it again, or build it anew with 'calibadv index'"
        ) from error
    # Views of the same memory without the class of numpy that makes every slice slower.
    index.scores = {name: np.asarray(value) if name != "num_docs" else value for name, value in stored.items()}
    return index


def _import_bm25s() -> Any:
    import bm25s  # type: ignore[import-untyped]

    # bm25s sets its own logger to DEBUG when it is imported.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def tokenize_words(texts: list[str], stopwords: str | list[str], stemmer: str | None) -> list[list[str]]:
    """Split texts into the words that are indexed and searched."""
    bm25s = _import_bm25s()
    if isinstance(stopwords, str):
        left_out: str | list[str] = [] if stopwords == "none" else stopwords
    else:
        left_out = [word.lower() for word in stopwords]
    # One per call: a stemmer must not be used by two threads at once.
    stem = None if stemmer is None else _make_stemmer(stemmer)
    try:
        words: list[list[str]] = bm25s.tokenize(
            texts, stopwords=left_out, stemmer=stem, return_ids=False, show_progress=False
        )
    except ValueError as error:
        raise UserError(
            f"stopwords is '{stopwords}'; it must be none, a language ({_LANGUAGES}), or a list of words"
        ) from error
    return words


def _make_stemmer(language: str) -> Any:
    try:
        import Stemmer  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"stemmer '{language}' needs the package PyStemmer; install it with pip install 'calibadv[stem]'"
        ) from error
    try:
        return Stemmer.Stemmer(language)
    except KeyError as error:
        known = ", ".join(Stemmer.algorithms())
        raise UserError(f"stemmer is '{language}'; it must be one of {known}") from error
