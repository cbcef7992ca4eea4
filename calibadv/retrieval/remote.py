"""Search on another machine, over Search-R1's HTTP protocol."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from calibadv.errors import OutageError, RetrievalError, UserError
from calibadv.interfaces import Retriever
from calibadv.retrieval.asking import Outcome, unwrap
from calibadv.retrieval.http.schema import SEARCH_FAILED, Results, parse_results
from calibadv.retrieval.ranking import check_search, check_top_k
from calibadv.types import ScoredDocument

if TYPE_CHECKING:
    import urllib3

# Seconds: no pause between two tries is longer, whatever the server asks for.
_LONGEST_PAUSE = 30.0
# Connections to one server that are kept open: as many as threads are likely to search at once.
_CONNECTIONS = 256
# Bytes of an answer: the most per document that is asked for, and what any answer may have.
_DOCUMENT_BYTES, _ANSWER_BYTES = 2**20, 4 * 2**20
_REMEDIES = {404: "correct the path of url", 413: "lower batch_size", 422: "correct what it names"}
# A server that has refused so many single queries of a batch, and answered none, is taken to refuse all of them.
_LOST_CAUSE = 8

_Fault = Literal["outage", "busy", "error", "refusal"]
"""Of a try: the server is away, has no time, failed (500) or does not want the request (400, 413, 422)."""


class Remote(Retriever):
    """Ask a retrieval server: ``calibadv serve``, or one of Search-R1, verl or SkyRL.

    Queries are sent in batches, round the servers in turn. A batch that gets no answer, or 429 or 5xx, goes to the next
    server, and after the last one round again, with pauses that double and vary. It never turns into an empty result.
    A batch that is answered 400, 413 or 422, or 500 twice, is halved until the query that the server fails at stands
    alone; only that one fails. A server that does not answer, or with 502 to 504, is away: until it is back, a batch is
    tried once per server. An answer may have 1 MiB per document that is asked for, and 4 MiB in any case. No proxy is
    used, whatever the environment says.

    Args:
        url: Address of the server, or of several with the same index; ``/retrieve`` is added if there is no path.
        top_k: Documents that an episode asks for per search.
        timeout: Seconds that a server may take for one batch.
        retries: Further tries of a batch; each server is tried at least once.
        batch_size: The most queries per request.
        backoff: Seconds before the second try of a server, at most; doubled for each further one.
        patience: Seconds that a run in training waits for a server that has answered before and is away, per batch of
            rollouts; then the run stops. 0 never waits: the rollouts that searched are left out.

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

        check_top_k(top_k)
        limits = (("retries", retries, 0), ("batch_size", batch_size, 1), ("backoff", backoff, 0))
        for name, value, least in (*limits, ("patience", patience, 0)):
            if not least <= value < math.inf:
                raise UserError(f"{name} is {value}; it must be a number of at least {least}")
        if not 0 < timeout < math.inf:
            raise UserError(f"timeout is {timeout}; it must be a number of seconds above 0")
        self.top_k = top_k
        self._urls = [_check_url(address) for address in ([url] if isinstance(url, str) else url)]
        if not self._urls:
            raise UserError("url is an empty list; give the address of at least one retrieval server")
        self._timeout = timeout
        self._tries = max(retries + 1, len(self._urls))
        self._batch_size = batch_size
        self._backoff = backoff
        self._patience = patience
        self._has_answered = self._away = False
        self._turns = itertools.count()
        self._pool = open_pool(_CONNECTIONS)

    @override
    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        check_search(queries, top_k)
        asked = [query for query in queries if query.strip()]
        batches = [asked[first : first + self._batch_size] for first in range(0, len(asked), self._batch_size)]
        threads = min(len(self._urls), len(batches))
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                answers = list(pool.map(lambda batch: self._ask(batch, top_k), batches))
        else:
            answers = [self._ask(batch, top_k) for batch in batches]
        outcomes = itertools.chain.from_iterable(answers)
        return unwrap([next(outcomes) if query.strip() else [] for query in queries])

    def _ask(self, queries: list[str], top_k: int) -> list[Outcome]:
        """Ask for one batch; what a server refuses is halved, without a pause, until it is a single query."""
        outcomes: list[Outcome] = []
        waiting = [queries]  # the next one last
        refused, answered = 0, False
        while waiting:
            batch = waiting.pop()
            try:
                outcomes += self._send(batch, top_k, halved=len(batch) < len(queries))
                answered = True
            except _RefusedError as error:
                refused += len(batch) == 1
                if len(batch) > 1 and (answered or refused < _LOST_CAUSE):
                    middle = len(batch) // 2
                    waiting += [batch[middle:], batch[:middle]]
                    continue
                outcomes += [error] * len(batch)
            except RetrievalError as error:  # whatever is sent: the rest would fare no better
                outcomes += [error] * (len(queries) - len(outcomes))
                break
        return outcomes

    def _send(self, queries: list[str], top_k: int, *, halved: bool) -> Results:
        """Send queries, until a server answers or the tries are used up."""
        body = json.dumps({"queries": queries, "topk": top_k, "return_scores": True}).encode()
        most = max(_ANSWER_BYTES, len(queries) * top_k * _DOCUMENT_BYTES)
        turn = next(self._turns)
        for attempt in itertools.count():
            url = self._urls[(turn + attempt) % len(self._urls)]
            try:
                answer = self._post(url, body, most)
            except _FailedTryError as error:
                failure = error
            else:
                found = _read(url, answer, len(queries), top_k)
                self._has_answered, self._away = True, False
                return found
            tries = self._most_tries(failure.fault, halved)
            if attempt + 1 >= tries:
                raise self._give_up(url, failure, attempt + 1)
            self._pause(attempt + 1, failure.seconds)
        raise AssertionError("tries end")

    def _most_tries(self, fault: _Fault, halved: bool) -> int:
        """How often a batch is sent that keeps failing this way."""
        servers = len(self._urls)
        if fault == "refusal":
            return 1
        if fault == "error":
            return servers if halved else min(self._tries, max(2, servers))
        return servers if self._away and fault == "outage" else self._tries

    def _give_up(self, url: str, failure: _FailedTryError, tried: int) -> RetrievalError:
        tries = "" if failure.fault == "refusal" else " (1 try)" if tried == 1 else f" ({tried} tries)"
        message = f"the retrieval server {url} {failure}{tries}; {failure.remedy}"
        if failure.fault == "outage":
            self._away = True
            # Before its first answer, nothing tells an outage from a mistake in the address.
            return OutageError(message, self._patience if self._has_answered else 0.0)
        return RetrievalError(message) if failure.fault == "busy" else _RefusedError(message)

    def _pause(self, tried: int, asked: float) -> None:
        """Wait before the next try, unless there is a server that has not been tried."""
        again = tried - len(self._urls)
        if again >= 0:
            # A generator of its own: drawing from the global one would change the draws of the training.
            jitter = random.Random().uniform(0.5, 1.0)
            time.sleep(min(max(self._backoff * 2.0 ** min(again, 30) * jitter, asked), _LONGEST_PAUSE))

    def _post(self, url: str, body: bytes, most: int) -> bytes:
        """Send one request and return the body of its answer, of so many bytes at most."""
        from urllib3 import Timeout, exceptions

        # Not compressed: a small answer could grow without bounds.
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        timeout = Timeout(total=self._timeout)
        try:
            response = self._pool.request(
                "POST", url, body=body, headers=headers, timeout=timeout, retries=False, preload_content=False
            )
            data = _read_all(response, most)
        except exceptions.NewConnectionError as error:
            reason = getattr(error.__cause__, "strerror", None) or error
            raise _FailedTryError("outage", f"is down ({reason})", "start it, or correct url") from error
        except (exceptions.TimeoutError, TimeoutError) as error:
            what = f"gave no answer within {self._timeout:g} s"
            raise _FailedTryError("outage", what, "raise timeout, lower batch_size or add servers") from error
        except exceptions.HTTPError as error:
            raise _FailedTryError("outage", f"broke off ({_one_line(str(error))})", "see its log") from error
        if len(data) > most:
            what = f"answered with more than {most // 2**20} MiB"
            raise RetrievalError(f"the retrieval server {url} {what}; is this url that of a retrieval server?")
        if response.status == 200:
            return data
        what = f"answered {response.status} ({_reason(data)})"
        fault = _fault(response.status, SEARCH_FAILED in response.headers)
        remedy = _REMEDIES.get(response.status, "is this url that of a retrieval server?")
        if fault is None:
            raise RetrievalError(f"the retrieval server {url} {what}; {remedy}")
        seconds = response.headers.get("Retry-After", "")
        remedy = remedy if fault == "refusal" else "see its log"
        raise _FailedTryError(fault, what, remedy, float(seconds) if seconds.isdecimal() else 0.0)


class _FailedTryError(Exception):
    """A try that failed in a way that another one, another server or fewer queries may not."""

    def __init__(self, fault: _Fault, what: str, remedy: str, seconds: float = 0.0) -> None:
        super().__init__(what)
        self.fault = fault
        self.remedy = remedy
        self.seconds = seconds


class _RefusedError(RetrievalError):
    """A batch that a server did answer, and that one of its queries may be to blame for."""


def _fault(status: int, search_failed: bool) -> _Fault | None:
    """What a status other than 200 means; None if no other try would help."""
    if status in (400, 413, 422):
        return "refusal"
    if status == 500 or search_failed:
        return "error"
    if 502 <= status <= 504:
        return "outage"
    return "busy" if status == 429 or status > 500 else None


def _read_all(response: urllib3.BaseHTTPResponse, most: int) -> bytes:
    """Read a body as it was sent, until its end or until it has more bytes than it may."""
    data = bytearray()
    try:
        while piece := response.read1(2**16, decode_content=False):
            data += piece
            if len(data) > most:
                response.close()
                break
    except BaseException:
        response.close()
        raise
    return bytes(data)


def _read(url: str, answer: bytes, queries: int, top_k: int) -> Results:
    try:
        return parse_results(answer, queries, top_k)
    except ValueError as error:
        raise RetrievalError(
            f"the retrieval server {url} answered {_one_line(str(error))}; is this url that of a retrieval server?"
        ) from error


def _reason(data: bytes) -> str:
    """What a refusal says: ours under ``error``, FastAPI's own under ``detail``, another's in its first words."""
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
