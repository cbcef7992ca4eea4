"""A scripted retriever, for tests and tutorials."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from calibadv.errors import RetrievalError, UserError
from calibadv.interfaces import Retriever
from calibadv.retrieval.asking import Outcome, unwrap
from calibadv.retrieval.ranking import check_search, check_top_k
from calibadv.types import Document, ScoredDocument


class MemoryRetriever(Retriever):
    """Answer each query with what was scripted for it, and with nothing otherwise.

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
        check_top_k(top_k)
        documents = documents or []
        by_id = {document.id: document for document in documents}
        if len(by_id) < len(documents):
            raise UserError(f"{len(documents)} documents have only {len(by_id)} different ids; ids must be unique")
        results = results or {}
        unknown = [doc_id for ids in results.values() for doc_id in ids if doc_id not in by_id]
        if unknown:
            raise UserError(f"results names the document '{unknown[0]}', which is not in documents; add it there")
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

    def _look_up(self, query: str, top_k: int) -> Outcome:
        if query in self._failing:
            return RetrievalError(f"the search for '{query}' is scripted to fail")
        return self._results.get(query, [])[:top_k]
