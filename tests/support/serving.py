"""Retrieval servers for tests: ours, in a thread, and one that answers whatever it is told to."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import uvicorn

from calibadv.interfaces import Retriever
from calibadv.retrieval.http.server import ServerLimits, listen, make_app


@contextmanager
def serving(retriever: Retriever, limits: ServerLimits | None = None, port: int = 0) -> Iterator[str]:
    """Serve on a port of this machine, by default a free one; yields the address without a path."""
    with listen("127.0.0.1", port) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(retriever, limits), log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Reply:
    """What the scripted server does with one request: wait for an event, then send status, headers and body."""

    def __init__(self, status: int, body: bytes, after: threading.Event | None = None, **headers: str) -> None:
        self.status, self.body, self.after, self.headers = status, body, after, headers

    def send(self, handler: BaseHTTPRequestHandler) -> None:
        if self.after:
            self.after.wait(10)
        handler.send_response(self.status)
        for name, value in {"Content_Length": str(len(self.body)), **self.headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(self.body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep the test output clean of clients that leave early, as they are meant to."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


Script = Callable[[int, dict[str, Any]], Reply]


class Scripted:
    """A server that asks a function of the request's number, from 0, and body how to reply, and records requests."""

    def __init__(self, script: Script) -> None:
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.paths.append(self.path)
                    outer.headers.append(dict(self.headers))
                try:
                    script(number, body).send(self)
                except ConnectionError:
                    self.close_connection = True

            def log_message(self, *arguments: Any) -> None:
                """Keep the test output clean."""

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Scripted:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def good(body: dict[str, Any]) -> Reply:
    """Results as Search-R1's server sends them: one document per query, named after it."""
    hits = [[{"document": {"id": query, "contents": f'"T"\n{query}'}, "score": 2.5}] for query in body["queries"]]
    return Reply(200, json.dumps({"result": hits}).encode())


def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def ask(
    url: str, body: Any, path: str = "/retrieve", method: str = "POST", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """One request, as a bare HTTP client sends it: status, JSON and headers of the answer."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=10)
    try:
        data = body if isinstance(body, bytes) or hasattr(body, "__next__") else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), dict(response.headers)
    finally:
        connection.close()
