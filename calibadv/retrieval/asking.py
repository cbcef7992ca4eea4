"""How a retriever is asked: one outcome per query, and no answer that is not one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calibadv.errors import PartialRetrievalError, RetrievalError, UserError, one_line
from calibadv.interfaces import Retriever
from calibadv.types import Document, ScoredDocument

Outcome = list[ScoredDocument] | RetrievalError
"""What became of one query: its documents, or why it failed."""


def ask(retriever: Retriever, queries: Sequence[str], top_k: int) -> list[Outcome]:
    """Ask a retriever, which may be a user's: what it answers is checked, and what it raises is taken apart."""
    name, may_fail = type(retriever).__name__, False
    try:
        answer: Any = retriever.search(queries, top_k)
    except PartialRetrievalError as error:
        answer, may_fail = error.results, True
    except RetrievalError as error:
        return [error] * len(queries)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name}.search raised {type(error).__name__} ({one_line(error)}); mend it, or raise RetrievalError where "
            "a search cannot be made"
        ) from error
    did = "raised PartialRetrievalError with" if may_fail else "returned"
    if not isinstance(answer, list | tuple):
        raise UserError(f"{name}.search {did} {_kind(answer)}; it must be a list with a list of documents per query")
    if len(answer) != len(queries):
        raise UserError(
            f"{name}.search {did} {len(answer)} results for {len(queries)} queries; it must be one list of documents "
            "per query"
        )
    return [
        result if may_fail and isinstance(result, RetrievalError) else _documents(result, top_k, f"{name}.search {did}")
        for result in answer
    ]


def unwrap(outcomes: Sequence[Outcome]) -> list[list[ScoredDocument]]:
    """Turn outcomes into what ``Retriever.search`` returns or raises."""
    found = [outcome for outcome in outcomes if not isinstance(outcome, RetrievalError)]
    if len(found) == len(outcomes):
        return found
    first = outcomes[0]
    if isinstance(first, RetrievalError) and all(outcome is first for outcome in outcomes):
        raise first
    raise PartialRetrievalError(outcomes)


def _documents(hits: Any, top_k: int, did: str) -> list[ScoredDocument]:
    """Check the documents of one query; each is kept once."""
    if not isinstance(hits, list | tuple):
        raise UserError(f"{did} {_kind(hits)} for a query; it must be a list of ScoredDocument")
    unique: dict[str, ScoredDocument] = {}
    for hit in hits:
        if not isinstance(hit, ScoredDocument) or not isinstance(hit.document, Document):
            wrong = hit.document if isinstance(hit, ScoredDocument) else hit
            raise UserError(f"{did} {_kind(wrong)} as a document; it must be a ScoredDocument of a Document")
        document = hit.document
        if not (isinstance(document.id, str) and isinstance(document.title, str) and isinstance(document.text, str)):
            field = next(name for name in ("id", "title", "text") if not isinstance(getattr(document, name), str))
            raise UserError(f"{did} a document whose {field} is {getattr(document, field)!r:.60}; it must be a string")
        unique.setdefault(document.id, hit)
    return list(unique.values())[:top_k]


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} ({value!r:.60})"
