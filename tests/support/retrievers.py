"""A small corpus and scripted retrievers over it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from calibadv.errors import PartialRetrievalError, RetrievalError
from calibadv.interfaces import Retriever
from calibadv.retrieval import MemoryRetriever
from calibadv.types import Document, Metrics, ScoredDocument

TEXTS = {
    "a": "rivers run through the city of hills",
    "b": "the quick brown fox jumps over lazy dogs",
    "c": "a fox lives in the hills",
    "d": "dogs run",
    "e": "the city sleeps",
}


DOCUMENTS = [Document(doc_id, doc_id.upper(), text) for doc_id, text in TEXTS.items()]


def memory(*ids: str, query: str = "q", top_k: int = 3) -> MemoryRetriever:
    return MemoryRetriever(DOCUMENTS, {query: list(ids)}, top_k, failing=["broken"])


def corpus_file(path: Path, count: int) -> str:
    lines = [json.dumps({"id": d.id, "title": d.title, "text": d.text}) for d in DOCUMENTS[:count]]
    path.write_text("\n".join(lines))
    return str(path)


def ids_of(found: list[list[ScoredDocument]]) -> list[list[str]]:
    return [[hit.document.id for hit in hits] for hits in found]


class Watched(MemoryRetriever):
    """A MemoryRetriever that keeps what it was asked, fails as long as it is told to, and reports metrics."""

    def __init__(self, **reports: float) -> None:
        super().__init__(DOCUMENTS, {doc_id: [doc_id] for doc_id in TEXTS}, failing=["broken"])
        self.asked: list[list[str]] = []
        self.down = False
        self.reports = reports

    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        self.asked.append(list(queries))
        if self.down:
            raise RetrievalError("down")
        return super().search(queries, top_k)

    def metrics(self) -> Metrics:
        return dict(self.reports)


def partial(retriever: Retriever, *queries: str) -> list[list[str] | str]:
    """What each query found, or why it failed, of a search that failed for some."""
    with pytest.raises(PartialRetrievalError) as caught:
        retriever.search(list(queries), 3)
    results = caught.value.results
    return [str(result) if isinstance(result, RetrievalError) else ids_of([result])[0] for result in results]


BROKEN = "the search for 'broken' is scripted to fail"
