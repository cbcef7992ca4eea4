"""Round trips to a real ``calibadv serve`` with many clients."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from rich.table import Table

from calibadv.retrieval import Remote
from tools.bench.retrieval.data import make_queries

_TOP_K = 3
Send = Callable[[list[str]], None]


@contextmanager
def serving(index: Path, threads: int) -> Iterator[str]:
    """Run ``calibadv serve`` on a free port; yields host and port."""
    words = [str(Path(sys.executable).with_name("calibadv")), "serve", "--index", str(index), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        greeting = process.stdout.readline()
        if "http://" not in greeting:
            raise SystemExit("calibadv serve did not start")
        yield greeting.partition("http://")[2].partition("/")[0]
    finally:
        process.terminate()
        process.wait()


def report_http(index: Path, passages: int, clients: int, rounds: int, threads: int) -> Table:
    """Let so many threads ask at once, in three ways that take turns."""
    title = f"HTTP: calibadv serve, BM25 of {passages:,} passages, {clients} clients in one other process"
    table = Table("client", "queries/request", "requests/s", "queries/s", "median ms", "95 % below ms", title=title)
    with serving(index, threads) as address:
        remote = Remote(f"http://{address}", top_k=_TOP_K)
        ways: list[tuple[str, Send, int, int]] = [
            ("Remote, shared by all threads", lambda queries: _ask(remote, queries), 1, 40),
            ("Search-R1's request, a connection each", lambda queries: _post(address, queries), 1, 40),
            ("Remote, shared by all threads", lambda queries: _ask(remote, queries), 64, 4),
        ]
        measured: list[list[tuple[float, list[float]]]] = [[] for _ in ways]
        with ThreadPoolExecutor(clients) as pool:
            for turn in range(rounds + 1):
                for place, (_, send, queries, requests) in enumerate(ways):
                    batches = _batches(clients * requests, queries, seed=turn)
                    measured[place].append(_time(pool, send, batches))
    for (name, _, queries, _), rounds_of in zip(ways, measured, strict=True):
        rates = [rate for rate, _ in rounds_of[1:]]  # the first warms up
        waits = sorted(wait for _, found in rounds_of[1:] for wait in found)
        rate = statistics.median(rates)
        table.add_row(
            name,
            str(queries),
            f"{rate:,.0f}",
            f"{rate * queries:,.0f}",
            f"{1e3 * statistics.median(waits):.0f}",
            f"{1e3 * waits[int(0.95 * len(waits))]:.0f}",
        )
    return table


def _batches(requests: int, queries: int, seed: int) -> list[list[str]]:
    drawn = make_queries(requests * queries, seed)
    return [drawn[first : first + queries] for first in range(0, len(drawn), queries)]


def _time(pool: ThreadPoolExecutor, send: Send, batches: list[list[str]]) -> tuple[float, list[float]]:
    """Requests per second, and the seconds of each."""

    def timed(queries: list[str]) -> float:
        start = time.perf_counter()
        send(queries)
        return time.perf_counter() - start

    start = time.perf_counter()
    waits = list(pool.map(timed, batches))
    return len(batches) / (time.perf_counter() - start), waits


def _ask(remote: Remote, queries: list[str]) -> None:
    found = remote.search(queries, _TOP_K)
    assert len(found) == len(queries)


def _post(address: str, queries: list[str]) -> None:
    """Send one request over a new connection, as ``requests.post`` in Search-R1 does."""
    body = json.dumps({"queries": queries, "topk": _TOP_K, "return_scores": True})
    connection = HTTPConnection(address, timeout=60)
    try:
        connection.request("POST", "/retrieve", body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    assert len(answer["result"]) == len(queries)
