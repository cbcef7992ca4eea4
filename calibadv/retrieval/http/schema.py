"""Search-R1's HTTP protocol: the bodies of ``POST /retrieve`` and of its response."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NamedTuple

from calibadv.retrieval.corpus.files import parse_document
from calibadv.types import Document, ScoredDocument

Results = list[list[ScoredDocument]]

SEARCH_FAILED = "X-Search-Failed"
"""Header of a 502 that a query of the request caused, not an outage of the retriever's backend."""

_EXAMPLE = '{"queries": ["who ..."], "topk": 3, "return_scores": true}'


class RequestError(ValueError):
    """An invalid request, with the status of its response."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class SearchRequest(NamedTuple):
    """The contents of a request."""

    queries: list[str]
    top_k: int
    return_scores: bool


def parse_request(body: bytes, default_top_k: int, max_queries: int, max_top_k: int) -> SearchRequest:
    """Parse the body of ``POST /retrieve``.

    ``queries`` is a list or one text; some clients call it ``query``. ``topk`` may be missing or null.
    """
    try:
        record = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON ({error}); send {_EXAMPLE}") from error
    if not isinstance(record, dict):
        raise RequestError(422, f"the body is not an object but {type(record).__name__}; send {_EXAMPLE}")
    top_k, return_scores = record.get("topk"), record.get("return_scores")
    if top_k is None:
        top_k = default_top_k
    elif type(top_k) is not int or not 1 <= top_k <= max_top_k:
        raise RequestError(422, f"topk is {top_k!r:.60}; it must be a whole number from 1 to {max_top_k}")
    if return_scores is not None and not isinstance(return_scores, bool):
        raise RequestError(422, f"return_scores is {return_scores!r:.60}; it must be true or false")
    return SearchRequest(_parse_queries(record, max_queries), top_k, bool(return_scores))


def _parse_queries(record: dict[str, Any], max_queries: int) -> list[str]:
    name = next((name for name in ("queries", "query") if record.get(name) is not None), None)
    if name is None:
        raise RequestError(422, f"the body has no 'queries'; send {_EXAMPLE}")
    queries = [record[name]] if isinstance(record[name], str) else record[name]
    if not isinstance(queries, list):
        raise RequestError(422, f"{name} is {queries!r:.60}; it must be a list of strings")
    if len(queries) > max_queries:
        raise RequestError(422, f"{name} holds {len(queries)} queries; send at most {max_queries} at once")
    for i, query in enumerate(queries):
        if not isinstance(query, str):
            raise RequestError(422, f"{name}[{i}] is {query!r:.60}; it must be a string")
    return queries


def render_results(found: Results, return_scores: bool) -> dict[str, Any]:
    """Return the body of a response."""
    if return_scores:
        return {"result": [[{"document": _render(hit.document), "score": hit.score} for hit in hits] for hits in found]}
    return {"result": [[_render(hit.document) for hit in hits] for hits in found]}


def _render(document: Document) -> dict[str, str]:
    return {"id": document.id, "contents": join_contents(document.title, document.text)}


def join_contents(title: str, text: str) -> str:
    r"""Join title and text in Search-R1's form: ``"\"Title\"\ntext"``, or the text alone without a title."""
    if not title and "\n" not in text:
        return text
    title = title.replace("\n", " ")
    return f'"{title}"\n{text}'


def parse_results(body: bytes, queries: int, top_k: int) -> Results:
    """Parse the response to ``POST /retrieve``; ValueError if it is invalid.

    A hit is ``{"document": ..., "score": ...}``, or the document alone if the server sends no scores; the n-th hit then
    has the score 1/n. A document has the form of a corpus file. Servers that search the web send no id: the id is then
    a hash of title and text, so that equal texts are the same document.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"text that is not JSON ({error})") from error
    lists = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(lists, list) or not all(isinstance(hits, list) for hits in lists):
        raise ValueError(f"{answer!r:.60}, which is not an object with a list of lists as 'result'")
    if len(lists) != queries:
        raise ValueError(f"{len(lists)} results to {queries} queries")
    return [
        [_parse_hit(hit, rank, f"result[{row}][{rank - 1}]") for rank, hit in enumerate(hits[:top_k], 1)]
        for row, hits in enumerate(lists)
    ]


def _parse_hit(hit: Any, rank: int, location: str) -> ScoredDocument:
    wrapped = isinstance(hit, dict) and "document" in hit
    record, score = (hit["document"], hit.get("score")) if wrapped else (hit, None)
    if not isinstance(record, dict):
        raise ValueError(f"{location}, which is not a document but {record!r:.60}")
    if score is None:
        score = 1 / rank
    elif not _is_finite(score):
        raise ValueError(f"{location}, which has the score {score!r:.60}; it must be a number")
    has_id = record.get("id") is not None
    document = parse_document(record if has_id else {**record, "id": ""}, location)
    if not has_id:
        texts = f"{document.title}\n{document.text}".encode()
        document = replace(document, id=f"text-{blake2b(texts, digest_size=8).hexdigest()}")
    return ScoredDocument(document, float(score))


def _is_finite(score: Any) -> bool:
    try:
        return type(score) in (int, float) and math.isfinite(score)
    except OverflowError:  # an integer beyond the range of floats
        return False
