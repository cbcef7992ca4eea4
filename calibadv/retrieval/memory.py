"""A scripted retriever, for tests and tutorials."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from typing_extensions import override

from calibadv.errors import RetrievalError, UserError
from calibadv.interfaces import Retriever
from calibadv.retrieval.checks import check_at_least, check_search
from calibadv.retrieval.outcomes import SearchOutcome, unwrap
from calibadv.types import Document, ScoredDocument


class MemoryRetriever(Retriever):
    """Return the documents scripted for each query, and none for any other query.

    Args:
        documents: The corpus.
        results: Ids of the documents that a query finds, best first. The n-th has score 1/n.
        top_k: Documents that an episode asks for per search.
        failing: Queries whose search fails, and no other's.

    Raises:
        UserError: a result is not in ``documents``, an id is repeated, or ``top_k`` is below 1.
    """

    def __init__(
        self,
        documents: list[Document] | None = None,
        results: dict[str, list[str]] | None = None,
        top_k: int = 3,
        failing: list[str] | None = None,
    ) -> None:
        check_at_least(1, top_k=top_k)
        documents, results = documents or [], results or {}
        by_id = {document.id: document for document in documents}
        if len(by_id) < len(documents):
            raise UserError(f"{len(documents)} documents have only {len(by_id)} different ids; ids must be unique")
        for doc_id in chain.from_iterable(results.values()):
            if doc_id not in by_id:
                raise UserError(f"results names the document '{doc_id}', which is not in documents; add it there")
        self.top_k = top_k
        self._failing = frozenset(failing or [])
        self._results = {
            query: [ScoredDocument(by_id[doc_id], 1 / rank) for rank, doc_id in enumerate(ids, 1)]
            for query, ids in results.items()
        }

    @override
    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        check_search(queries, top_k)
        return unwrap([self._look_up(query, top_k) for query in queries])

    def _look_up(self, query: str, top_k: int) -> SearchOutcome:
        if query in self._failing:
            return RetrievalError(f"the search for '{query}' is scripted to fail")
        return self._results.get(query, [])[:top_k]
