"""Lexical search with BM25."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibadv.errors import UserError
from calibadv.interfaces import Retriever
from calibadv.progress import blocks
from calibadv.retrieval.corpus import Corpus, open_corpus, searched_text
from calibadv.retrieval.errors import one_line
from calibadv.retrieval.manifest import INDEX_NAMES, Manifest, open_index
from calibadv.retrieval.postings import Postings
from calibadv.retrieval.ranking import best_rows, check_search, check_top_k
from calibadv.types import Document, ScoredDocument

# From this many documents on, indexing takes longer than about two seconds, so a progress bar is shown.
_LARGE_CORPUS = 20_000
# Documents whose words are held as text at a time.
_BLOCK = 1 << 13
_LANGUAGES = (
    "english, german, dutch, french, spanish, portuguese, italian, russian, swedish, norwegian, chinese, turkish, "
    "korean, danish"
)


class BM25(Retriever):
    """Search by words, with BM25 (bm25s; Lucene's variant, k1 1.5, b 0.75) over title and text.

    Words are lower-cased and have at least two characters. The index is built in memory from ``corpus``, or is read
    from ``index``, which brings its corpus along; it is memory-mapped, so that only its vocabulary takes memory.

    Args:
        corpus: JSON-lines file, plain or gzip, or ``embedded``. Leave it out with ``index``.
        top_k: Documents that an episode asks for per search.
        stopwords: Words that are not searched for: ``english``, ``none``, another language (german, dutch, french,
            spanish, portuguese, italian, russian, swedish, norwegian, chinese, turkish, korean, danish), or a list of
            words. By default what the index was built with, and English for a corpus.
        stemmer: Language of a Snowball stemmer, such as ``english`` or ``porter``, which makes ``films`` find ``film``
            (needs the extra ``stem``). By default what the index was built with, and no stemming for a corpus.
        index: Folder of ``calibadv index --backend bm25``.

    Raises:
        UserError: there is neither ``corpus`` nor ``index`` or there are both, one of them cannot be read or has no
            words, ``stopwords`` or ``stemmer`` is unknown or differs from the index, or ``top_k`` is below 1.
    """

    corpus: Corpus

    def __init__(
        self,
        corpus: str | None = None,
        top_k: int = 3,
        stopwords: str | list[str] | None = None,
        stemmer: str | None = None,
        index: str | None = None,
    ) -> None:
        check_top_k(top_k)
        self.top_k = top_k
        if index is not None and corpus is not None:
            raise UserError(f"index '{index}' brings its own corpus; leave out corpus '{corpus}' (set it to null)")
        if index is not None:
            manifest, self.corpus = open_index(Path(index))
            self._stopwords, self._stemmer = _settings_of(index, manifest, stopwords, stemmer)
            self._index = _load_bm25(Path(index), len(self.corpus))
        elif corpus is not None:
            self._stopwords, self._stemmer = "english" if stopwords is None else stopwords, stemmer
            self.corpus = open_corpus(corpus)
            large = len(self.corpus) >= _LARGE_CORPUS
            self._index = build_bm25(self.corpus, self._stopwords, self._stemmer, show_progress=large)
        else:
            raise UserError("BM25 has nothing to search; give corpus (a JSON-lines file) or index (a folder)")

    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        """Find the best documents of each query.

        Args:
            queries: texts to search for.
            top_k: the most documents per query.

        Returns:
            One list per query, best first, ties in the order of the corpus. A query without a known word finds nothing.

        Raises:
            UserError: ``top_k`` is below 1, or ``queries`` is one text.
        """
        check_search(queries, top_k)
        return [self._search_words(words, top_k) for words in _tokenize(list(queries), self._stopwords, self._stemmer)]

    def _search_words(self, words: list[str], top_k: int) -> list[ScoredDocument]:
        # Each different word is scored once, so that a query that repeats one a million times costs no more for it.
        by_count: dict[int, list[int]] = defaultdict(list)
        for word, count in Counter(self._index.get_tokens_ids(words)).items():
            by_count[count].append(word)
        if not by_count:
            return []
        parts = [self._index.get_scores_from_ids(ids) for ids in by_count.values()]
        for part, count in zip(parts, by_count, strict=True):
            part *= np.float32(count)
        scores: NDArray[np.float32] = parts[0]
        for part in parts[1:]:
            scores += part
        return [ScoredDocument(self.corpus[row], float(scores[row])) for row in best_rows(scores, top_k)]


def build_bm25(
    documents: Sequence[Document], stopwords: str | list[str], stemmer: str | None, show_progress: bool
) -> Any:
    """Index documents. Texts are read in blocks; at its peak this needs about 20 bytes per word and document.

    Args:
        documents: title and text of each are indexed.
        stopwords: a language, ``none``, or a list of words.
        stemmer: a Snowball language, or None.
        show_progress: whether to show a progress bar.

    Returns:
        A ``bm25s.BM25``.

    Raises:
        UserError: ``stopwords`` or ``stemmer`` is unknown, or no document has a word.
    """
    bm25s = _import_bm25s()
    _tokenize([], stopwords, stemmer)  # refuses unknown names before anything is read
    postings = Postings()
    for block in blocks(documents, _BLOCK, "Indexing the corpus", hidden=not show_progress):
        postings.add(_tokenize([searched_text(document) for document in block], stopwords, stemmer))
    if not postings.vocabulary:
        raise UserError("the corpus has no word to search for; words have at least two characters and no stop-words")
    index = bm25s.BM25()
    index.scores = postings.scores(index.k1, index.b)
    index.vocab_dict = postings.vocabulary
    index.nonoccurrence_array = None  # of other variants
    return index


def save_bm25(index: Any, folder: Path) -> None:
    """Write an index: three arrays of numpy, and two JSON files.

    Args:
        index: of ``build_bm25``.
        folder: made if it is not there.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    index.save(folder, allow_pickle=False, show_progress=False)
    for name in ("data", "indices", "indptr"):
        # numpy, which writes them, does not notice where the last bytes find no space.
        try:
            np.load(folder / f"{name}.csc.index.npy", mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise OSError(f"{name}.csc.index.npy was cut off, as on a full disk") from error


def _settings_of(
    index: str, manifest: Manifest, stopwords: str | list[str] | None, stemmer: str | None
) -> tuple[str | list[str], str | None]:
    """What an index was built with, which the caller may only repeat."""
    if manifest.backend != "bm25":
        raise UserError(f"index '{index}' was built with --backend {manifest.backend}; give it to Dense, or build one")
    built = manifest.settings
    for name, given in (("stopwords", stopwords), ("stemmer", stemmer)):
        if given is not None and given != built[name]:
            raise UserError(
                f"{name} is {given!r}, and index '{index}' was built with {built[name]!r}; leave {name} out, or build "
                "the index again"
            )
    return built["stopwords"], built["stemmer"]


def _load_bm25(folder: Path, documents: int) -> Any:
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


def _tokenize(texts: list[str], stopwords: str | list[str], stemmer: str | None) -> list[list[str]]:
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
