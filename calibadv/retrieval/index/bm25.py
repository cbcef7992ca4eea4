"""BM25 indexes of bm25s: building in blocks, saving and memory-mapped loading.

bm25s builds an index from the words of the whole corpus, as lists of strings. Here only one block of documents at a
time is held as strings, so that millions of documents can be indexed.
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
from calibadv.retrieval.corpus.base import searchable_text
from calibadv.retrieval.index.manifest import INDEX_NAMES
from calibadv.types import Document

# Documents whose words are held as strings at a time.
_BLOCK = 1 << 13
_LANGUAGES = (
    "english, german, dutch, french, spanish, portuguese, italian, russian, swedish, norwegian, chinese, turkish, "
    "korean, danish"
)


def build_bm25(
    documents: Sequence[Document], stopwords: str | list[str], stemmer: str | None, show_progress: bool
) -> Any:
    """Build an index. Peak memory is about 20 bytes per word of every document."""
    bm25s = import_bm25s()
    tokenize_words([], stopwords, stemmer)  # refuses unknown names before the corpus is read
    inverted = InvertedIndex()
    for block in blocks(documents, _BLOCK, "Indexing the corpus", hidden=not show_progress):
        inverted.add(tokenize_words([searchable_text(document) for document in block], stopwords, stemmer))
    if not inverted.vocabulary:
        raise UserError("the corpus has no word to search for; words have at least two characters and no stop-words")
    index = bm25s.BM25()
    index.scores = inverted.pop_scores(index.k1, index.b)
    index.vocab_dict = inverted.vocabulary
    index.nonoccurrence_array = None  # used by other variants of BM25
    return index


def save_bm25(index: Any, folder: Path) -> None:
    """Write an index as three numpy arrays and two JSON files."""
    index.save(folder, allow_pickle=False, show_progress=False)
    for name in ("data", "indices", "indptr"):
        # numpy does not report a disk that is full when the last bytes are written.
        try:
            np.load(folder / f"{name}.csc.index.npy", mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise OSError(f"{name}.csc.index.npy was cut off, as on a full disk") from error


def load_bm25(folder: Path, documents: int) -> Any:
    """Open an index that ``save_bm25`` wrote, memory-mapped."""
    bm25s = import_bm25s()
    try:
        index = bm25s.BM25.load(folder / INDEX_NAMES["bm25"], mmap=True, allow_pickle=False)
        stored = index.scores
        whole = len(stored["data"]) == len(stored["indices"]) == stored["indptr"][-1]
        if not whole or stored["num_docs"] != documents or len(index.vocab_dict) != len(stored["indptr"]) - 1:
            raise UserError("its files do not belong together")
    except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError) as error:
        # numpy takes a file that is no array for a pickle, and advises to allow pickles.
        reason = "one of its arrays is damaged" if "pickle" in str(error) else one_line(error)
        raise UserError(
            f"index '{folder}' does not load ({reason}); copy it again, or build it anew with 'calibadv index'"
        ) from error
    # Plain arrays over the same mapped memory: slices of numpy.memmap are slower.
    index.scores = {name: np.asarray(value) if name != "num_docs" else value for name, value in stored.items()}
    return index


def tokenize_words(texts: list[str], stopwords: str | list[str], stemmer: str | None) -> list[list[str]]:
    """Split texts into the words that are indexed and searched."""
    bm25s = import_bm25s()
    if isinstance(stopwords, str):
        excluded: str | list[str] = [] if stopwords == "none" else stopwords
    else:
        excluded = [word.lower() for word in stopwords]
    # A new one for each call: stemmers are not thread-safe.
    stem = None if stemmer is None else _make_stemmer(stemmer)
    try:
        words: list[list[str]] = bm25s.tokenize(
            texts, stopwords=excluded, stemmer=stem, return_ids=False, show_progress=False
        )
    except ValueError as error:
        raise UserError(
            f"stopwords is '{stopwords}'; it must be none, a language ({_LANGUAGES}), or a list of words"
        ) from error
    return words


class InvertedIndex:
    """The documents of each word, collected in blocks of documents."""

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}  # id of each word, in the order of first appearance
        self._lengths: list[NDArray[np.int64]] = []
        self._documents = 0
        self._blocks: list[_Block] = []

    def add(self, texts: Sequence[Sequence[str]]) -> None:
        """Add the words of the next documents."""
        ids = self.vocabulary
        words = np.fromiter((ids.setdefault(word, len(ids)) for text in texts for word in text), np.int64)
        lengths = np.fromiter(map(len, texts), np.int64)
        rows = np.repeat(np.arange(self._documents, self._documents + len(texts)), lengths)
        pairs, counts = np.unique(words << 32 | rows, return_counts=True)
        unique_words, document_counts = np.unique(pairs >> 32, return_counts=True)
        rows = (pairs & 0xFFFFFFFF).astype(np.int32)
        self._blocks.append(_Block(unique_words, document_counts, rows, counts.astype(np.int32)))
        self._lengths.append(lengths)
        self._documents += len(texts)

    def pop_scores(self, k1: float, b: float) -> dict[str, Any]:
        """Compute the score of each word in each of its documents, consuming the blocks to save memory.

        Lucene's BM25 (Kamphuis et al. 2020, "Which BM25 Do You Mean?", without the constant factor k1 + 1): a word that
        occurs in n of N documents, c times in one of length l, where the mean length is m, scores
        log(1 + (N - n + 0.5) / (n + 0.5)) c / (c + k1 (1 - b + b l / m)). Returns the sparse column matrix of documents
        by words that bm25s stores: ``data`` [P], their rows ``indices`` [P], and ``indptr`` [V + 1], where words start.
        """
        frequency = np.zeros(len(self.vocabulary), np.int64)
        for block in self._blocks:
            frequency[block.words] += block.document_counts
        # Rounded to float32 where bm25s rounds, so that both give the same scores.
        idf = np.log(1 + (self._documents - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
        lengths = np.concatenate(self._lengths)
        norms = k1 * ((1 - b) + b * lengths / lengths.mean())
        starts = np.concatenate([[0], np.cumsum(frequency)])
        data, indices = np.empty(starts[-1], np.float32), np.empty(starts[-1], np.int32)
        free = starts[:-1].copy()
        self._blocks.reverse()
        while self._blocks:
            block = self._blocks.pop()
            repeats = block.document_counts
            positions = np.repeat(free[block.words] - (np.cumsum(repeats) - repeats), repeats) + np.arange(
                len(block.rows)
            )
            data[positions] = np.repeat(idf[block.words], repeats) * (block.counts / (norms[block.rows] + block.counts))
            indices[positions] = block.rows
            free[block.words] += repeats
        return {"data": data, "indices": indices, "indptr": starts, "num_docs": self._documents}


@dataclass(frozen=True, slots=True)
class _Block:
    """P postings of a block of documents, sorted by word and document."""

    words: NDArray[np.int64]  # [W] the different words
    document_counts: NDArray[np.int64]  # [W] number of documents of each word
    rows: NDArray[np.int32]  # [P] document of each posting
    counts: NDArray[np.int32]  # [P] occurrences of the word in the document


def import_bm25s() -> Any:
    """Import bm25s, and silence its logger."""
    import bm25s  # type: ignore[import-untyped]

    # It sets its own logger to DEBUG when it is imported.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


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
