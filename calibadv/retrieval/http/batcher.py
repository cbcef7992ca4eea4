"""Micro-batching of requests: those that arrive together become one search."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType

from calibadv.errors import RetrievalError
from calibadv.interfaces import Retriever
from calibadv.retrieval.http.schema import Results
from calibadv.retrieval.outcomes import SearchOutcome, search_outcomes, unwrap

# Seconds to collect further requests after one has arrived: short for a client, long enough for clients that were
# answered together to send their next requests.
_COLLECT_SECONDS = 0.002


class BusyError(RuntimeError):
    """Too many queries are pending."""


@dataclass(frozen=True, slots=True)
class _Request:
    queries: Sequence[str]
    top_k: int
    answer: asyncio.Future[Results]


@dataclass(frozen=True, slots=True)
class _Search:
    queries: list[str]
    top_k: int
    found: Future[list[SearchOutcome]]


class Batcher:
    """Combine concurrent requests into searches, which run in one thread: retrievers need not be thread-safe.

    The thread runs while the asynchronous context is open; leaving it drops pending requests. A search that runs then
    does not keep the process alive. A search has at most ``max_batch`` queries, and at most ``max_pending`` are waiting
    or being searched, except that a single request may have more.
    """

    def __init__(self, retriever: Retriever, max_batch: int, max_pending: int) -> None:
        self._retriever = retriever
        self._max_batch = max_batch
        self._max_pending = max_pending
        self._pending = 0
        self._waiting: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._searches: SimpleQueue[_Search | None] = SimpleQueue()

    async def __aenter__(self) -> Batcher:
        # Not a ThreadPoolExecutor: the interpreter waits for its threads, however long they search.
        threading.Thread(target=self._run_searches, name="retriever", daemon=True).start()
        self._loop = asyncio.create_task(self._serve())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.cancel()
        self._searches.put(None)

    async def search(self, queries: Sequence[str], top_k: int) -> Results:
        """Search together with requests that arrive at the same time; BusyError if too many are pending."""
        if self._pending and self._pending + len(queries) > self._max_pending:
            raise BusyError(f"{self._pending} queries wait already, of {self._max_pending} at most; try again later")
        request = _Request(queries, top_k, asyncio.get_running_loop().create_future())
        self._pending += len(queries)
        self._waiting.append(request)
        self._arrived.set()
        try:
            return await request.answer
        finally:
            self._pending -= len(queries)

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            await asyncio.sleep(_COLLECT_SECONDS)
            # A search for more documents may rank them differently (fusion, reranking), so its results cannot be
            # truncated for requests with a smaller top_k.
            by_top_k: defaultdict[int, list[_Request]] = defaultdict(list)
            for request in self._take_batch():
                by_top_k[request.top_k].append(request)
            for requests in by_top_k.values():
                await self._answer(requests)

    def _take_batch(self) -> list[_Request]:
        """Remove the first waiting requests, as many as fit into one search."""
        taken = [self._waiting.popleft()]
        size = len(taken[0].queries)
        while self._waiting and size + len(self._waiting[0].queries) <= self._max_batch:
            taken.append(self._waiting.popleft())
            size += len(taken[-1].queries)
        if not self._waiting:
            self._arrived.clear()
        return taken

    async def _answer(self, requests: list[_Request]) -> None:
        queries = [query for request in requests for query in request.queries]
        search = _Search(queries, requests[0].top_k, Future())
        self._searches.put(search)
        try:
            found = await asyncio.wrap_future(search.found)
        except Exception as error:
            if len(requests) == 1:
                _fail(requests[0], error)
            else:
                # One request may have caused the error: search for each alone, so that only that one fails.
                for request in requests:
                    await self._answer([request])
        else:
            # Failed queries are not searched again: during an outage that would multiply the waiting time.
            for request in requests:
                _answer(request, found[: len(request.queries)])
                del found[: len(request.queries)]

    def _run_searches(self) -> None:
        """Run searches in the thread until the queue yields None."""
        while search := self._searches.get():
            if not search.found.set_running_or_notify_cancel():
                continue
            try:
                found = search_outcomes(self._retriever, search.queries, search.top_k)
            except BaseException as error:
                search.found.set_exception(error)
            else:
                search.found.set_result(found)


def _answer(request: _Request, outcomes: list[SearchOutcome]) -> None:
    """Complete a request; it fails if one of its queries failed."""
    try:
        results = unwrap(outcomes)
    except RetrievalError as error:
        _fail(request, error)
    else:
        # The answer is done already if its request was cancelled.
        if not request.answer.done():
            request.answer.set_result(results)


def _fail(request: _Request, error: Exception) -> None:
    if not request.answer.done():
        request.answer.set_exception(error)
