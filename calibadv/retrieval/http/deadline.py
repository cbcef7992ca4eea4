"""HTTP connections whose answers are over by a deadline, however slowly they drip."""

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
    """Make a pool of connections, in which the total of a request's ``urllib3.Timeout`` bounds the whole answer.

    urllib3 by itself applies it to each receipt of bytes anew, so that one byte now and then holds the caller for ever.
    """
    pool = PoolManager(maxsize=connections)
    pool.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
    return pool


class _Stream(io.RawIOBase):
    """Bytes as a socket receives them, until a deadline."""

    def __init__(self, received: io.RawIOBase, connection: socket.socket) -> None:
        self._received = received
        self._connection = connection
        # What urllib3 has just set: what is left of the total, after connecting and sending.
        seconds = connection.gettimeout()
        assert seconds is not None
        self._deadline = time.monotonic() + seconds

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._connection.settimeout(left)
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
