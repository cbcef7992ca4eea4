"""Searches with one outcome per query: the documents found, or the error of that query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calibadv.errors import PartialRetrievalError, RetrievalError, UserError, naming_part
from calibadv.interfaces import Retriever
from calibadv.types import Document, ScoredDocument

SearchOutcome = list[ScoredDocument] | RetrievalError
"""The documents of one query, or the error that it failed with."""


def search_outcomes(retriever: Retriever, queries: Sequence[str], top_k: int) -> list[SearchOutcome]:
    """Search with any retriever, a user's included: validate its results and map its errors to queries.

    Each query gets at most ``top_k`` documents, none of them twice. Other errors and results are a UserError.
    """
    name, partial = type(retriever).__name__, False
    try:
        advice = "; mend it, or raise RetrievalError where a search cannot be made"
        with naming_part(f"{name}.search", advice, passing=(UserError, RetrievalError)):
            results: Any = retriever.search(queries, top_k)
    except PartialRetrievalError as error:
        results, partial = error.results, True
    except RetrievalError as error:
        return [error] * len(queries)
    source = f"{name}.search {'raised PartialRetrievalError with' if partial else 'returned'}"
    _check_results(results, len(queries), source)
    return [
        result if partial and isinstance(result, RetrievalError) else _unique_documents(result, top_k, source)
        for result in results
    ]


def unwrap(outcomes: Sequence[SearchOutcome]) -> list[list[ScoredDocument]]:
    """Return the documents of all queries, or raise RetrievalError or PartialRetrievalError, as a retriever does."""
    found = [outcome for outcome in outcomes if not isinstance(outcome, RetrievalError)]
    if len(found) == len(outcomes):
        return found
    first = outcomes[0]
    if isinstance(first, RetrievalError) and all(outcome is first for outcome in outcomes):
        raise first
    raise PartialRetrievalError(outcomes)


def _check_results(results: Any, queries: int, source: str) -> None:
    if not isinstance(results, list | tuple):
        raise UserError(f"{source} {_described(results)}; it must be a list with a list of documents per query")
    if len(results) != queries:
        raise UserError(
            f"{source} {len(results)} results for {queries} queries; it must be one list of documents per query"
        )


def _unique_documents(hits: Any, top_k: int, source: str) -> list[ScoredDocument]:
    if not isinstance(hits, list | tuple):
        raise UserError(f"{source} {_described(hits)} for a query; it must be a list of ScoredDocument")
    unique: dict[str, ScoredDocument] = {}
    for hit in hits:
        _check_hit(hit, source)
        unique.setdefault(hit.document.id, hit)
    return list(unique.values())[:top_k]


def _check_hit(hit: Any, source: str) -> None:
    document = hit.document if isinstance(hit, ScoredDocument) else hit
    if document is hit or not isinstance(document, Document):
        raise UserError(f"{source} {_described(document)} as a document; it must be a ScoredDocument of a Document")
    for field in ("id", "title", "text"):
        value = getattr(document, field)
        if not isinstance(value, str):
            raise UserError(f"{source} a document whose {field} is {value!r:.60}; it must be a string")


def _described(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} ({value!r:.60})"
