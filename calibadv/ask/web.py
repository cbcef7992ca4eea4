"""The agent in a browser: one page on this machine, and a stream of JSON lines per question."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from string import Template
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from calibadv.ask.session import Session
from calibadv.errors import UserError, one_line

_MAX_QUESTION = 4000  # bytes of a request


def page() -> str:
    """Return the page, which loads nothing from elsewhere."""
    folder = files("calibadv.ask") / "templates"
    script, style = ((folder / name).read_text(encoding="utf-8") for name in ("page.js", "style.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = Template((folder / "page.html").read_text(encoding="utf-8"))
    return template.substitute(script=script, style=style, script_hash=f"sha256-{digest}")


def make_server(session: Session, port: int) -> ThreadingHTTPServer:
    """Make the server of the page: ``GET /`` and ``POST /ask``, whose body is a question.

    It listens on this machine only, and answers requests for no other host name: a page from elsewhere cannot read it.
    """
    html, one_at_a_time = page().encode(), Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self._is_local() and self.path == "/":
                self._start(200, "text/html; charset=utf-8")
                self.wfile.write(html)
            else:
                self.send_error(404)

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if not self._is_local() or self.path != "/ask" or not 0 < size <= _MAX_QUESTION:
                self.send_error(404)
                return
            question = self.rfile.read(size).decode("utf-8", "replace").strip()
            self._start(200, "application/x-ndjson; charset=utf-8")
            with one_at_a_time:
                for line in _lines(session, question):
                    try:
                        self.wfile.write(line)
                    except OSError:  # the page was closed
                        return

        def _is_local(self) -> bool:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            origin = urlsplit(self.headers.get("Origin") or "").hostname
            return host in ("127.0.0.1", "localhost") and origin in (None, "127.0.0.1", "localhost")

        def _start(self, status: int, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def _lines(session: Session, question: str) -> Iterator[bytes]:
    """The events of a question as JSON lines; an error is one of them."""
    try:
        for event in session.ask(question):
            yield _line(event.as_json())
    except Exception as error:
        yield _line({"kind": "error", "text": one_line(error), "content": None})


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"  # in ASCII: a text may hold half of a surrogate pair


def serve_page(session: Session, port: int) -> None:
    """Serve the page until Ctrl-C."""
    try:
        server = make_server(session, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} cannot be used ({error}); give another --port") from error
    with server:
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        Console(soft_wrap=True).print(f"open {address} in a browser; Ctrl-C stops it", highlight=False)
        server.serve_forever()
