"""Lexical search with BM25."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from calibadv.errors import UserError
from calibadv.interfaces import Retriever
from calibadv.numerics.ranking import best_rows
from calibadv.retrieval.checks import check_at_least, check_search
from calibadv.retrieval.corpus.base import Corpus
from calibadv.retrieval.index.bm25 import build_bm25, load_bm25, tokenize_words
from calibadv.retrieval.index.manifest import Manifest, open_index
from calibadv.retrieval.index.open import open_corpus
from calibadv.types import ScoredDocument

# From this many documents on, indexing takes longer than about two seconds, so a progress bar is shown.
_LARGE_CORPUS = 20_000


class BM25(Retriever):
    """Lexical search with BM25 (bm25s; Lucene's variant, k1 1.5, b 0.75) over title and text.

    Words are lower-cased and have at least two characters. The index is built in memory from ``corpus``, or is opened
    from ``index``, which contains its corpus; it is memory-mapped, so that only its vocabulary takes memory.

    Args:
        corpus: JSON-lines file, plain or gzip, or ``embedded``. Leave it out with ``index``.
        top_k: Documents that an episode asks for per search.
        stopwords: Words that are not searched for: ``english``, ``none``, another language (german, dutch, french,
            spanish, portuguese, italian, russian, swedish, norwegian, chinese, turkish, korean, danish), or a list of
            words. By default those of the index, and English for a corpus.
        stemmer: Language of a Snowball stemmer, such as ``english`` or ``porter``, which makes ``films`` find ``film``
            (needs the extra ``stem``). By default that of the index, and no stemming for a corpus.
        index: Folder of ``calibadv index --backend bm25``.

    Raises:
        UserError: neither or both of ``corpus`` and ``index`` are given, one of them cannot be read or has no words,
            ``stopwords`` or ``stemmer`` is unknown or differs from the index, or ``top_k`` is below 1.
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
        check_at_least(1, top_k=top_k)
        self.top_k = top_k
        if index is not None and corpus is not None:
            raise UserError(f"index '{index}' brings its own corpus; leave out corpus '{corpus}' (set it to null)")
        if index is not None:
            manifest, self.corpus = open_index(Path(index))
            self._stopwords, self._stemmer = _stored_settings(index, manifest, stopwords, stemmer)
            self._index = load_bm25(Path(index), len(self.corpus))
        elif corpus is not None:
            self._stopwords, self._stemmer = "english" if stopwords is None else stopwords, stemmer
            self.corpus = open_corpus(corpus)
            large = len(self.corpus) >= _LARGE_CORPUS
            self._index = build_bm25(self.corpus, self._stopwords, self._stemmer, show_progress=large)
        else:
            raise UserError("BM25 has nothing to search; give corpus (a JSON-lines file) or index (a folder)")

    @override
    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        check_search(queries, top_k)
        return [
            self._search_words(words, top_k) for words in tokenize_words(list(queries), self._stopwords, self._stemmer)
        ]

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


def _stored_settings(
    index: str, manifest: Manifest, stopwords: str | list[str] | None, stemmer: str | None
) -> tuple[str | list[str], str | None]:
    """The settings that an index was built with; the caller may repeat them but not change them."""
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
