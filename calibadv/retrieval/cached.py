"""A least-recently-used cache of search results."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from typing_extensions import override

from calibadv.errors import RetrievalError
from calibadv.interfaces import Retriever
from calibadv.retrieval.checks import check_at_least, check_search
from calibadv.retrieval.outcomes import SearchOutcome, search_outcomes, unwrap
from calibadv.types import Metrics, ScoredDocument

_Key = tuple[str, int]


class Cached(Retriever):
    """Cache the results of another retriever by query.

    Beyond ``max_queries``, the least recently used query is dropped. A failed search is not cached. Safe to use from
    several threads. The share of queries answered from the cache is plotted as ``cache_hit_rate``.

    Args:
        retriever: The retriever whose results are cached, by class_path.
        top_k: Documents that an episode asks for per search; by default as many as the retriever's own.
        max_queries: Queries whose documents are cached; at three passages of 600 bytes each, 100,000 take about 200 MB.

    Raises:
        UserError: ``top_k`` or ``max_queries`` is below 1.
    """

    def __init__(self, retriever: Retriever, top_k: int | None = None, max_queries: int = 100_000) -> None:
        self.top_k = retriever.top_k if top_k is None else top_k
        check_at_least(1, max_queries=max_queries, top_k=self.top_k)
        self.corpus = retriever.corpus
        self._retriever = retriever
        self._max_queries = max_queries
        self._cache: OrderedDict[_Key, tuple[ScoredDocument, ...]] = OrderedDict()
        self._lock = Lock()
        self._lookups = 0
        self._searches = 0

    @override
    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        check_search(queries, top_k)
        found: dict[str, SearchOutcome] = {query: list(hits) for query, hits in self._look_up(queries, top_k).items()}
        unknown = list(dict.fromkeys(query for query in queries if query not in found))
        if unknown:
            # Searched without the lock: two threads that miss the same query both search for it.
            found.update(zip(unknown, search_outcomes(self._retriever, unknown, top_k), strict=True))
            self._store(unknown, top_k, found)
        with self._lock:
            # Failed queries are left out: they are counted when they are searched for again.
            self._lookups += sum(not isinstance(found[query], RetrievalError) for query in queries)
            self._searches += sum(not isinstance(found[query], RetrievalError) for query in unknown)
        return unwrap([_copy(found[query]) for query in queries])

    def _look_up(self, queries: Sequence[str], top_k: int) -> dict[str, tuple[ScoredDocument, ...]]:
        found = {}
        with self._lock:
            for query in queries:
                if (query, top_k) in self._cache:
                    self._cache.move_to_end((query, top_k))
                    found[query] = self._cache[query, top_k]
        return found

    def _store(self, queries: Sequence[str], top_k: int, found: dict[str, SearchOutcome]) -> None:
        with self._lock:
            for query in queries:
                outcome = found[query]
                if not isinstance(outcome, RetrievalError):
                    self._cache[query, top_k] = tuple(outcome)
                    self._cache.move_to_end((query, top_k))
            while len(self._cache) > self._max_queries:
                self._cache.popitem(last=False)

    @override
    def metrics(self) -> Metrics:
        with self._lock:
            lookups, searches = self._lookups, self._searches
            self._lookups = self._searches = 0
        hit_rate = {"cache_hit_rate": 1 - searches / lookups} if lookups else {}
        return {**self._retriever.metrics(), **hit_rate}


def _copy(outcome: SearchOutcome) -> SearchOutcome:
    """Return a separate list for each query, which the caller may change; a query may occur twice."""
    return outcome if isinstance(outcome, RetrievalError) else list(outcome)
