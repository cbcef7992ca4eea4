"""Answers of a retriever, kept for when a query comes again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from typing_extensions import override

from calibadv.errors import RetrievalError, UserError
from calibadv.interfaces import Retriever
from calibadv.retrieval.asking import Outcome, ask, unwrap
from calibadv.retrieval.ranking import check_search, check_top_k
from calibadv.types import Metrics, ScoredDocument

_Key = tuple[str, int]


class Cached(Retriever):
    """Search for each query once, and keep what was found while it is used.

    Beyond ``max_queries``, what was not asked for the longest is forgotten. A failed search is not kept. Threads may
    search at the same time. The share of queries that needed no search is plotted as ``cache_hit_rate``.

    Args:
        retriever: What searches, by class_path.
        top_k: Documents that an episode asks for per search; by default as many as the retriever's own.
        max_queries: Queries whose documents are kept; at three passages of 600 bytes each, 100,000 take about 200 MB.

    Raises:
        UserError: ``top_k`` or ``max_queries`` is below 1.
    """

    def __init__(self, retriever: Retriever, top_k: int | None = None, max_queries: int = 100_000) -> None:
        if max_queries < 1:
            raise UserError(f"max_queries is {max_queries}; it must be at least 1")
        self.top_k = retriever.top_k if top_k is None else top_k
        check_top_k(self.top_k)
        self.corpus = retriever.corpus
        self._retriever = retriever
        self._max_queries = max_queries
        self._kept: OrderedDict[_Key, tuple[ScoredDocument, ...]] = OrderedDict()
        self._lock = Lock()
        self._lookups = 0
        self._searches = 0

    @override
    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        check_search(queries, top_k)
        found: dict[str, Outcome] = {query: list(hits) for query, hits in self._look_up(queries, top_k).items()}
        unknown = list(dict.fromkeys(query for query in queries if query not in found))
        if unknown:
            # Other threads may go on meanwhile: two that miss the same query both search for it.
            found.update(zip(unknown, ask(self._retriever, unknown, top_k), strict=True))
            self._keep(unknown, top_k, found)
        with self._lock:
            # What failed is left out: it will be asked for again, and counts then.
            self._lookups += sum(not isinstance(found[query], RetrievalError) for query in queries)
            self._searches += sum(not isinstance(found[query], RetrievalError) for query in unknown)
        return unwrap([_copy(found[query]) for query in queries])

    def _look_up(self, queries: Sequence[str], top_k: int) -> dict[str, tuple[ScoredDocument, ...]]:
        found = {}
        with self._lock:
            for query in queries:
                if (query, top_k) in self._kept:
                    self._kept.move_to_end((query, top_k))
                    found[query] = self._kept[query, top_k]
        return found

    def _keep(self, queries: Sequence[str], top_k: int, found: dict[str, Outcome]) -> None:
        with self._lock:
            for query in queries:
                outcome = found[query]
                if not isinstance(outcome, RetrievalError):
                    self._kept[query, top_k] = tuple(outcome)
                    self._kept.move_to_end((query, top_k))
            while len(self._kept) > self._max_queries:
                self._kept.popitem(last=False)

    @override
    def metrics(self) -> Metrics:
        with self._lock:
            lookups, searches = self._lookups, self._searches
            self._lookups = self._searches = 0
        hit_rate = {"cache_hit_rate": 1 - searches / lookups} if lookups else {}
        return {**self._retriever.metrics(), **hit_rate}


def _copy(outcome: Outcome) -> Outcome:
    """A list of its own for each caller and query: a query may come twice."""
    return outcome if isinstance(outcome, RetrievalError) else list(outcome)
