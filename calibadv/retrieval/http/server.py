"""A retriever behind Search-R1's HTTP protocol: ``POST /retrieve``."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from calibadv.errors import OutageError, PartialRetrievalError, RetrievalError, UserError
from calibadv.interfaces import Retriever
from calibadv.retrieval.checks import check_at_least
from calibadv.retrieval.http.batcher import Batcher, BusyError
from calibadv.retrieval.http.schema import SEARCH_FAILED, RequestError, parse_request, render_results

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

# Seconds that an idle connection stays open; longer than the pauses between two turns of an agent.
_KEEP_ALIVE = 75
# Seconds that requests in flight may take after a signal to stop.
_GRACE = 60

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerLimits:
    """Limits of single requests and of a server in total.

    Raises:
        UserError: a limit is below 1.
    """

    max_body_bytes: int = 16 * 2**20
    """Bytes of a request's body."""
    max_queries: int = 4096
    """Queries of one request. Search-R1 sends those of all its rollouts at once: 2,560 in its recipe."""
    max_top_k: int = 100
    """Documents per query."""
    max_batch: int = 256
    """Queries per search if several requests are combined."""
    max_pending: int = 16384
    """Queries that are waiting or being searched; a request beyond them is answered 503."""

    def __post_init__(self) -> None:
        check_at_least(1, **asdict(self))


def make_app(retriever: Retriever, limits: ServerLimits | None = None) -> FastAPI:
    """Build the application: ``POST /retrieve`` and ``GET /health``.

    Requests that arrive together are combined into one search; only requests with a failed query fail. Each error is
    ``{"error": reason}``, with status 400 (the body is not JSON), 413 (the body is too long), 422 (the request is
    invalid), 502 (the retriever reports a failure), 503 (too many pending queries, or the server stops) or 500.
    """
    _require_packages()
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    limits = limits or ServerLimits()
    batcher = Batcher(retriever, limits.max_batch, limits.max_pending)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield

    async def retrieve(request: Request) -> Response:
        try:
            body = await _read_body(request, limits.max_body_bytes)
            wanted = parse_request(body, retriever.top_k, limits.max_queries, limits.max_top_k)
            found = await batcher.search(wanted.queries, wanted.top_k)
            return _json(200, render_results(found, wanted.return_scores))
        except (Exception, asyncio.CancelledError) as error:
            return _error_response(error)

    async def health(request: Request) -> Response:
        documents = None if retriever.corpus is None else len(retriever.corpus)
        about = {"retriever": type(retriever).__name__, "documents": documents, "top_k": retriever.top_k}
        return _json(200, {"status": "ok", **about})

    async def refuse_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}", error.headers)

    return FastAPI(
        routes=[Route("/retrieve", retrieve, methods=["POST"]), Route("/health", health, methods=["GET"])],
        exception_handlers={HTTPException: refuse_route},
        lifespan=lifespan,
        openapi_url=None,  # the routes parse their bodies themselves, so there is no schema to describe
    )


def run_server(
    retriever: Retriever, host: str = "127.0.0.1", port: int = 8000, limits: ServerLimits | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, then answer the requests in flight and return.

    After a second signal, or 60 s, requests still in flight are answered 503. A running search continues in a daemon
    thread, which ends with the process.
    """
    app = make_app(retriever, limits)
    import uvicorn

    with listen(host, port) as listener:
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_GRACE,
        )
        server = _new_server(config)
        Console(soft_wrap=True).print(_greeting(listener), highlight=False, markup=False)
        with _stop_on_signals(server):
            server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket of a server."""
    if not 0 <= port < 2**16:
        raise UserError(f"port is {port}; it must be from 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # localhost may have addresses of both families; clients use 127.0.0.1.
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        listener = socket.create_server(address, family=family)
    except OSError as error:
        # strerror of a system error repeats the address; errors of name resolution have negative numbers.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(f"cannot listen on host '{host}', port {port} ({reason}); give another host or port") from error
    # Connections inherit it. asyncio does not set it on sockets that it did not open, and without it the body of a
    # response waits 40 ms for the acknowledgement of its headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _error_response(error: BaseException) -> Response:
    """Return the response for an error; called where it is handled, so that the log has the traceback."""
    if isinstance(error, RequestError):
        return _error(error.status, str(error))
    if isinstance(error, RetrievalError):
        return _error(502, str(error), None if _is_outage(error) else {SEARCH_FAILED: "true"})
    if isinstance(error, BusyError):
        return _error(503, str(error), {"Retry-After": "1"})
    if isinstance(error, asyncio.CancelledError):  # cancelled by the server after the grace period
        return _error(503, "the server stops; ask another one, or this one when it is up again")
    _log.exception("a search failed")
    cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
    return _error(500, f"the search failed with {type(cause).__name__}; the log of the server says more")


def _is_outage(error: RetrievalError) -> bool:
    """Tell if all failures are due to an outage of the retriever's backend."""
    results = error.results if isinstance(error, PartialRetrievalError) else [error]
    return all(isinstance(result, OutageError) for result in results if isinstance(result, RetrievalError))


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """Read a body up to a limit, without trust in its Content-Length."""
    from starlette.requests import ClientDisconnect

    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise RequestError(413, f"the body has more than {max_bytes} bytes; send fewer queries at once")
    except ClientDisconnect as error:
        raise RequestError(400, "the connection ended before the body did") from error
    return bytes(body)


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    from starlette.responses import Response

    # ASCII escapes, since a text may hold half of a surrogate pair, which UTF-8 cannot encode.
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Response(text, status, headers, media_type="application/json")


def _error(status: int, reason: str, headers: Any = None) -> Response:
    return _json(status, {"error": " ".join(reason.split())}, headers)


def _require_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"serving needs the package {error.name}; install it with: pip install 'calibadv[serve]'"
        ) from error


def _greeting(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/retrieve"
    if ip_address(host).is_loopback:
        return f"serving at {url}, for this machine only; Ctrl-C stops it"
    return f"serving at {url}; WARNING: anyone who can reach this machine may query it; Ctrl-C stops it"


def _new_server(config: uvicorn.Config) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """A server that answers all requests when stopped: uvicorn drops them after the second signal."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                for task in list(self.server_state.tasks):
                    task.cancel()
            self.should_exit = True

    return Server(config)


@contextmanager
def _stop_on_signals(server: uvicorn.Server) -> Iterator[None]:
    """Handle signals that arrive before uvicorn installs its handlers, and after it removes them."""
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
