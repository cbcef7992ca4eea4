"""Client of retrieval servers that use Search-R1's HTTP protocol."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from calibadv.errors import OutageError, RetrievalError, UserError
from calibadv.interfaces import Retriever
from calibadv.retrieval.checks import check_at_least, check_search
from calibadv.retrieval.http.schema import SEARCH_FAILED, Results, parse_results
from calibadv.retrieval.outcomes import SearchOutcome, unwrap
from calibadv.types import ScoredDocument

if TYPE_CHECKING:
    import urllib3

# Seconds of the longest pause between two attempts, whatever the server asks for.
_MAX_PAUSE = 30.0
# Connections to one server that are kept open: the number of threads that are likely to search at once.
_CONNECTIONS = 256
# Limits of a response: bytes per requested document, and bytes that any response may have.
_DOCUMENT_BYTES, _MIN_LIMIT_BYTES = 2**20, 4 * 2**20
_WRONG_URL = "is this url that of a retrieval server?"
_REMEDIES = {404: "correct the path of url", 413: "lower batch_size", 422: "correct what it names"}
# A server that has refused so many single queries of a batch and answered none is assumed to refuse all of them.
_MAX_REFUSED = 8
# Addresses that have answered in this process; a run that goes back to a checkpoint makes its client anew.
_answered: set[str] = set()

_Fault = Literal["outage", "busy", "error", "refusal"]
"""Failure of an attempt: the server is unreachable, is overloaded, failed (500) or refused it (400, 413, 422)."""


class Remote(Retriever):
    """Client of a retrieval server: ``calibadv serve``, or one of Search-R1, verl or SkyRL.

    Queries are sent in batches, to several servers in turn. A batch that gets no response, 429 or 5xx is sent to the
    next server, and after the last to the first again, with exponential backoff and jitter. A failure never becomes an
    empty result. A batch that gets 400, 413 or 422, or 500 twice, is halved until the query that causes it is alone;
    only that query fails. A server that gives no response, or 502 to 504, is down: until it is back, a batch is sent to
    each server once. A response may have 1 MiB per requested document, and at least 4 MiB. Proxy settings of the
    environment are ignored.

    Args:
        url: Address of the server, or of several with the same index; ``/retrieve`` is added if there is no path.
        top_k: Documents that an episode asks for per search.
        timeout: Seconds that a server may take for one batch.
        retries: Further attempts for a batch; each server is tried at least once.
        batch_size: The most queries per request.
        backoff: Longest pause in seconds before the second attempt at a server; doubled for each further one.
        patience: Seconds that training waits, per batch of rollouts, for a server that has answered before and is down;
            then the run stops. 0 never waits: the rollouts that searched are left out.

    Raises:
        UserError: an address is malformed, or a number is out of its range.
    """

    def __init__(
        self,
        url: str | list[str],
        top_k: int = 3,
        timeout: float = 30.0,
        retries: int = 3,
        batch_size: int = 256,
        backoff: float = 0.5,
        patience: float = 300.0,
    ) -> None:
        from calibadv.retrieval.http.deadline import open_pool

        check_at_least(1, top_k=top_k, batch_size=batch_size)
        for name, value in (("retries", retries), ("backoff", backoff), ("patience", patience)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name} is {value}; it must be a number of at least 0")
        if not 0 < timeout < math.inf:
            raise UserError(f"timeout is {timeout}; it must be a number of seconds above 0")
        self.top_k = top_k
        self._urls = [_check_url(address) for address in ([url] if isinstance(url, str) else url)]
        if not self._urls:
            raise UserError("url is an empty list; give the address of at least one retrieval server")
        self._timeout = timeout
        self._attempts = max(retries + 1, len(self._urls))
        self._batch_size = batch_size
        self._backoff = backoff
        self._patience = patience
        self._is_down = False
        self._turns = itertools.count()
        self._pool = open_pool(_CONNECTIONS)

    @override
    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        check_search(queries, top_k)
        nonempty = [query for query in queries if query.strip()]
        batches = [nonempty[i : i + self._batch_size] for i in range(0, len(nonempty), self._batch_size)]
        outages: list[OutageError] = []
        threads = min(len(self._urls), len(batches))
        if threads > 1:
            with ThreadPool(threads) as pool:  # of daemon threads: one that hangs does not keep the process alive
                answers = pool.map(lambda batch: self._search_batch(batch, top_k, outages), batches)
        else:
            answers = [self._search_batch(batch, top_k, outages) for batch in batches]
        outcomes = itertools.chain.from_iterable(answers)
        return unwrap([next(outcomes) if query.strip() else [] for query in queries])

    def _search_batch(self, queries: list[str], top_k: int, outages: list[OutageError]) -> list[SearchOutcome]:
        """Search for one batch; a refused batch is halved, without a pause, down to single queries."""
        if outages:  # another batch would hang until its timeout too
            return [outages[0]] * len(queries)
        outcomes: list[SearchOutcome] = []
        waiting = [queries]  # a stack
        refused, answered = 0, False
        while waiting:
            batch = waiting.pop()
            try:
                outcomes += self._send(batch, top_k, halved=len(batch) < len(queries))
                answered = True
            except _RefusedError as error:
                refused += len(batch) == 1
                if len(batch) > 1 and (answered or refused < _MAX_REFUSED):
                    middle = len(batch) // 2
                    waiting += [batch[middle:], batch[:middle]]
                    continue
                outcomes += [error] * len(batch)
            except RetrievalError as error:  # independent of the queries: the rest would fail too
                outcomes += [error] * (len(queries) - len(outcomes))
                outages += [error] if isinstance(error, OutageError) else []
                break
        return outcomes

    def _send(self, queries: list[str], top_k: int, *, halved: bool) -> Results:
        """Send queries until a server answers or all attempts have failed."""
        body = json.dumps({"queries": queries, "topk": top_k, "return_scores": True}).encode()
        max_bytes = max(_MIN_LIMIT_BYTES, len(queries) * top_k * _DOCUMENT_BYTES)
        turn = next(self._turns)
        for attempt in itertools.count():
            url = self._urls[(turn + attempt) % len(self._urls)]
            try:
                answer = self._post(url, body, max_bytes)
            except _AttemptError as error:
                failure = error
            else:
                found = _parse(url, answer, len(queries), top_k)
                self._is_down = False
                _answered.update(self._urls)
                return found
            if attempt + 1 >= self._max_attempts(failure.fault, halved):
                raise self._give_up(url, failure, attempt + 1)
            self._pause(attempt + 1, failure.seconds)
        raise AssertionError("unreachable: attempts are limited")

    def _max_attempts(self, fault: _Fault, halved: bool) -> int:
        """Return the number of attempts for a batch that keeps failing with this fault."""
        servers = len(self._urls)
        if fault == "refusal":
            return 1
        if fault == "error":
            return servers if halved else min(self._attempts, max(2, servers))
        return servers if self._is_down and fault == "outage" else self._attempts

    def _give_up(self, url: str, failure: _AttemptError, attempts: int) -> RetrievalError:
        tries = "" if failure.fault == "refusal" else " (1 try)" if attempts == 1 else f" ({attempts} tries)"
        message = f"the retrieval server {url} {failure}{tries}; {failure.remedy}"
        if failure.fault == "outage":
            self._is_down = True
            # Before the first response, an outage cannot be told from a wrong address.
            return OutageError(message, self._patience if _answered.intersection(self._urls) else 0.0)
        return RetrievalError(message) if failure.fault == "busy" else _RefusedError(message)

    def _pause(self, attempts: int, requested: float) -> None:
        """Wait before the next attempt, unless it goes to a server that has not been tried."""
        retry = attempts - len(self._urls)
        if retry >= 0:
            # A generator of its own, so that the global one and with it the training stay reproducible.
            jitter = random.Random().uniform(0.5, 1.0)
            time.sleep(min(max(self._backoff * 2.0 ** min(retry, 30) * jitter, requested), _MAX_PAUSE))

    def _post(self, url: str, body: bytes, max_bytes: int) -> bytes:
        """Send one request and return the body of the response, which may have ``max_bytes`` at most."""
        from urllib3 import Timeout, exceptions

        # No compression: the size of the decompressed body would be unlimited.
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        timeout = Timeout(total=self._timeout)
        try:
            response = self._pool.request(
                "POST", url, body=body, headers=headers, timeout=timeout, retries=False, preload_content=False
            )
            data = _read_body(response, max_bytes)
        except exceptions.NewConnectionError as error:
            reason = getattr(error.__cause__, "strerror", None) or error
            raise _AttemptError("outage", f"is down ({reason})", "start it, or correct url") from error
        except (exceptions.TimeoutError, TimeoutError) as error:
            reason = f"gave no answer within {self._timeout:g} s"
            raise _AttemptError("outage", reason, "raise timeout, lower batch_size or add servers") from error
        except exceptions.HTTPError as error:
            raise _AttemptError("outage", f"broke off ({_one_line(str(error))})", "see its log") from error
        if len(data) > max_bytes:
            reason = f"answered with more than {max_bytes // 2**20} MiB"
            raise RetrievalError(f"the retrieval server {url} {reason}; {_WRONG_URL}")
        if response.status == 200:
            return data
        reason = f"answered {response.status} ({_reason(data)})"
        fault = _fault(response.status, SEARCH_FAILED in response.headers)
        remedy = _REMEDIES.get(response.status, _WRONG_URL)
        if fault is None:
            raise RetrievalError(f"the retrieval server {url} {reason}; {remedy}")
        seconds = response.headers.get("Retry-After", "")
        remedy = remedy if fault == "refusal" else "see its log"
        raise _AttemptError(fault, reason, remedy, float(seconds) if seconds.isdecimal() else 0.0)


class _AttemptError(Exception):
    """A failed attempt that may succeed when repeated, at another server or with fewer queries."""

    def __init__(self, fault: _Fault, reason: str, remedy: str, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.fault = fault
        self.remedy = remedy
        self.seconds = seconds


class _RefusedError(RetrievalError):
    """A batch that a server refused, perhaps because of one of its queries."""


def _fault(status: int, search_failed: bool) -> _Fault | None:
    """Classify a status other than 200; None if another attempt cannot help."""
    if status in (400, 413, 422):
        return "refusal"
    if status == 500 or search_failed:
        return "error"
    if 502 <= status <= 504:
        return "outage"
    return "busy" if status == 429 or status > 500 else None


def _read_body(response: urllib3.BaseHTTPResponse, max_bytes: int) -> bytes:
    """Read a body without decoding, to its end or until it exceeds the limit."""
    data = bytearray()
    try:
        while piece := response.read1(2**16, decode_content=False):
            data += piece
            if len(data) > max_bytes:
                response.close()
                break
    except BaseException:
        response.close()
        raise
    return bytes(data)


def _parse(url: str, answer: bytes, queries: int, top_k: int) -> Results:
    try:
        return parse_results(answer, queries, top_k)
    except ValueError as error:
        raise RetrievalError(f"the retrieval server {url} answered {_one_line(str(error))}; {_WRONG_URL}") from error


def _reason(data: bytes) -> str:
    """Return the reason in a body: ``error`` of our server, ``detail`` of FastAPI, else its first words."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        return _one_line(str(record.get("error") or record.get("detail") or "no reason given"))
    return _one_line(data.decode(errors="replace")) or "no reason given"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]} ..."


def _check_url(url: str) -> str:
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    try:
        parts = parse_url(url.strip())
    except LocationParseError:
        parts = None
    if parts is None or parts.scheme not in ("http", "https") or not parts.host:
        raise UserError(f"url is '{url}'; give an address such as http://127.0.0.1:8000/retrieve")
    return (parts if parts.path not in (None, "", "/") else parts._replace(path="/retrieve")).url
