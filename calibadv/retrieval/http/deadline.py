"""HTTP connections with a deadline for the whole response."""

from __future__ import annotations

import io
import socket
import time
from http.client import HTTPResponse
from typing import Any

from typing_extensions import override
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection


def open_pool(connections: int) -> PoolManager:
    """Make a connection pool in which the total of a request's ``urllib3.Timeout`` limits the whole response.

    urllib3 itself restarts the timeout with every received byte, so a slowly dripping response can block the caller
    indefinitely.
    """
    pool = PoolManager(maxsize=connections)
    pool.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
    return pool


class _Stream(io.RawIOBase):
    """The bytes that a socket receives until a deadline."""

    def __init__(self, received: io.RawIOBase, connection: socket.socket) -> None:
        self._received = received
        self._connection = connection
        # urllib3 has just set the timeout to the rest of the total after connecting and sending.
        seconds = connection.gettimeout()
        assert seconds is not None
        self._deadline = time.monotonic() + seconds

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int | None:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        self._connection.settimeout(remaining)
        return self._received.readinto(buffer)

    @override
    def close(self) -> None:
        self._received.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Stream(self.fp.detach(), sock))


class _Connection(HTTPConnection):
    response_class = _Response


class _TLSConnection(HTTPSConnection):
    response_class = _Response


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection
