"""Index types of FAISS beside each other: memory, seconds to build, queries per second, recall."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from calibadv.retrieval.index.faiss import build_faiss, nearest_rows, set_effort
from tools.bench.retrieval.data import DIMENSION, Vectors

_TOP_K, _BATCH = 10, 256


@dataclass(frozen=True, slots=True)
class IndexType:
    """A factory string, and the efforts to search it with: values of ``nprobe`` or ``ef_search``; none for neither."""

    factory: str
    parameter: str = ""
    efforts: tuple[int, ...] = ()


def index_types(count: int) -> list[IndexType]:
    """What is compared for so many vectors: one list for about 200 of them, of which 64 train it."""
    lists = 2 ** round(np.log2(count / 200))
    return [
        IndexType("Flat"),
        IndexType("SQ8"),
        IndexType(f"IVF{lists},Flat", "nprobe", (1, 8, 32)),
        IndexType(f"IVF{lists},SQ8", "nprobe", (8, 32)),
        IndexType(f"IVF{lists},PQ48", "nprobe", (8, 32)),
        IndexType("HNSW32", "ef_search", (16, 64, 256)),
    ]


def report_types(console: Console, count: int, rounds: int, threads: int) -> Table:
    """Build each type, search it, and compare with Flat."""
    import faiss

    faiss.omp_set_num_threads(threads)
    made = Vectors(count)
    blocks = list(made.blocks())
    queries = made.queries(_BATCH)
    title = f"Index types, {count:,} made-up vectors of {DIMENSION} dimensions, {_BATCH} queries at once"
    recall = f"recall@{_TOP_K}"
    table = Table("factory", "effort", "bytes/vector", "build s", "queries/s", recall, title=title)
    exact: NDArray[np.int64] | None = None
    for kind in index_types(count):
        with console.status(f"index type {kind.factory}"):
            start = time.perf_counter()
            index = build_faiss(blocks, count, DIMENSION, kind.factory)
            seconds = time.perf_counter() - start
            size = len(faiss.serialize_index(index)) / count
            for effort in kind.efforts or (None,):
                if effort is not None:
                    set_effort(index, **{"nprobe": None, "ef_search": None, kind.parameter: effort})
                speed, found = search(index, queries, rounds)
                exact = found if exact is None else exact
                shown = "" if effort is None else f"{kind.parameter} {effort}"
                share = np.mean([len(np.intersect1d(*pair)) / _TOP_K for pair in zip(exact, found, strict=True)])
                table.add_row(kind.factory, shown, f"{size:,.0f}", f"{seconds:.1f}", f"{speed:,.0f}", f"{share:.3f}")
    return table


def search(index: Any, queries: NDArray[np.float32], rounds: int) -> tuple[float, NDArray[np.int64]]:
    """Queries per second, as ``Dense`` searches; and the rows that are found, -1 where there are fewer."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        found = nearest_rows(index, queries, _TOP_K)
        seconds.append(time.perf_counter() - start)
    rows = np.full((len(queries), _TOP_K), -1)
    for row, hits in zip(rows, found, strict=True):
        row[: len(hits)] = [number for number, _ in hits]
    return len(queries) / statistics.median(seconds), rows
