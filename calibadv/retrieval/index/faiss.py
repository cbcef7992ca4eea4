"""FAISS indexes over inner products: building, loading, and searching with ties in the order of the rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibadv.errors import UserError, one_line
from calibadv.io.progress_bar import progress_bar
from calibadv.retrieval.checks import check_at_least

# From this many vectors on, filling an index may take more than about two seconds.
_LARGE_INDEX = 100_000
# FAISS asks for at least 39 training vectors per centroid and uses at most 256; quantizers have up to 256 centroids.
_VECTORS_PER_CENTROID = 64
_QUANTIZER_SAMPLE = 1 << 16
# The beginning of FAISS's error messages: a C++ function, a file and line, and a condition.
_SOURCE_LOCATION = re.compile(r"^Error in .*? at \S+:\d+: (Error: )?('.*' failed: ?)?")
# Candidates fetched beyond top_k, to resolve ties and rounding.
_EXTRA_CANDIDATES = 8
# FAISS crashes if a memory-mapped file ends within a number, as one that is cut off in its header does; files below
# this size are read instead.
_MIN_MAPPED_BYTES = 1 << 20
_FACTORIES = "Flat, IVF4096,Flat, HNSW32 or another string of faiss.index_factory"


def build_faiss(shards: Sequence[NDArray[np.float32]], count: int, dimension: int, factory: str) -> Any:
    """Build an index in memory: ``make_index``, ``check_trainable`` and ``fill_index`` in one call."""
    index = make_index(factory, dimension)
    check_trainable(index, factory, count)
    fill_index(index, factory, shards, count)
    return index


def make_index(factory: str, dimension: int) -> Any:
    """Make an index without vectors."""
    import faiss

    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"factory '{factory}' is not one that faiss makes for inner products of {dimension} dimensions "
            f"({_reason(error)}); give {_FACTORIES}"
        ) from error
    if _has_ids(index):
        raise UserError(f"factory '{factory}' stores vector ids of its own; leave out IDMap")
    return index


def check_trainable(index: Any, factory: str, count: int) -> None:
    """Refuse an index that needs more vectors for training than there are, before they are encoded."""
    centroids = _max_centroids(index)
    if centroids > count:
        raise UserError(
            f"factory '{factory}' needs at least {centroids} vectors to train, and the corpus has {count} documents; "
            "give Flat, or fewer lists"
        )


def fill_index(index: Any, factory: str, shards: Sequence[NDArray[np.float32]], count: int) -> None:
    """Train an index, if its type needs it, on evenly spaced vectors, and add all vectors."""
    _disable_polysemous_training(index)
    try:
        if not index.is_trained:
            index.train(_training_sample(index, shards, count))
        if hasattr(index, "codes"):
            # Reserves memory; growing step by step, it would need up to twice as much.
            index.codes.resize(count * index.code_size)
        with progress_bar("Filling the index", count, hidden=count < _LARGE_INDEX) as advance:
            for shard in shards:
                index.add(np.ascontiguousarray(shard, np.float32))
                advance(len(shard))
    except RuntimeError as error:
        raise UserError(
            f"factory '{factory}' does not work for {count} vectors of {index.d} dimensions ({_reason(error)}); give "
            f"{_FACTORIES}"
        ) from error


def save_faiss(index: Any, path: Path) -> None:
    """Write an index to a file."""
    import faiss

    # FAISS's own writer does not report a disk that is full when the last bytes are written.
    with path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]


def load_faiss(path: Path, count: int) -> Any:
    """Open an index. A large one is memory-mapped: vectors and codes stay on disk, graphs and centroids are read."""
    import faiss

    try:
        mapped = path.stat().st_size >= _MIN_MAPPED_BYTES
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"index file '{path}' does not load ({_reason(error)}); it may be cut off: copy it again, or build it anew"
        ) from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UserError(
            f"index file '{path}' does not compare by the inner product (FAISS metric {index.metric_type}); "
            "build it with faiss.METRIC_INNER_PRODUCT"
        )
    if _has_ids(index):
        raise UserError(
            f"index file '{path}' stores vector ids of its own, which need not be rows of the corpus; build it without "
            "IDMap"
        )
    if index.ntotal != count:
        raise UserError(
            f"index file '{path}' holds {index.ntotal} vectors, and the corpus has {count} documents; give the corpus "
            "that it was built of"
        )
    return index


def set_effort(index: Any, nprobe: int | None, ef_search: int | None) -> None:
    """Set how much of an index a search visits: lists of an IVF index, candidates of an HNSW index."""
    import faiss

    for name, key, kind, value in (("nprobe", "nprobe", "IVF", nprobe), ("ef_search", "efSearch", "HNSW", ef_search)):
        if value is None:
            continue
        check_at_least(1, **{name: value})
        try:
            faiss.ParameterSpace().set_index_parameter(index, key, value)
        except RuntimeError as error:
            kinds = type(faiss.downcast_index(index)).__name__
            raise UserError(f"{name} is {value}, but {kinds} has no such parameter; only {kind} indexes do") from error


def nearest_rows(index: Any, vectors: NDArray[np.float32], top_k: int) -> list[list[tuple[int, float]]]:
    """Find the rows with the largest inner products, ties in the order of the rows.

    For Flat the result is exact and does not depend on the other queries of the batch: FAISS multiplies in blocks, so
    that its sums, and with them the order of equal vectors, depend on the position in a block. Other types are searched
    by FAISS, and only their results are ordered. ``vectors`` is [Q, D]; rows come with their scores, best first.
    """
    import faiss

    flat = faiss.downcast_index(index)
    if isinstance(flat, faiss.IndexFlat):
        return _exact_rows(flat, vectors, min(top_k, flat.ntotal))
    scores, rows = index.search(vectors, min(top_k, index.ntotal))
    found = []
    for row_scores, row_numbers in zip(scores, rows, strict=True):
        kept = row_numbers >= 0  # FAISS fills up with -1
        found.append(_ranked(row_numbers[kept], row_scores[kept], top_k))
    return found


def _has_ids(index: Any) -> bool:
    """Tell if an index or a part of it stores an id with each vector, instead of numbering the rows."""
    import faiss

    return isinstance(_inner_index(index), faiss.IndexIDMap)


def _max_centroids(index: Any) -> int:
    """Return the largest number of centroids that one part of an index is trained for."""
    import faiss

    index = _inner_index(index)
    if isinstance(index, faiss.IndexHNSW):
        return _max_centroids(index.storage)
    quantizer = getattr(index, "pq", None)
    return max(getattr(index, "nlist", 0), 0 if quantizer is None else quantizer.ksub)


def _disable_polysemous_training(index: Any) -> None:
    """Turn off polysemous training (arXiv 1609.01882), which factory strings with PQ turn on.

    It reorders the centroids for a filter that our searches do not use, and takes many times as long as the rest.
    """
    index = _inner_index(index)
    if hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False


def _inner_index(index: Any) -> Any:
    """Return the index inside transforms of the vectors and refinements of the results."""
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _inner_index(index.index)
    return _inner_index(index.base_index) if isinstance(index, faiss.IndexRefine) else index


def _training_sample(index: Any, shards: Sequence[NDArray[np.float32]], count: int) -> NDArray[np.float32]:
    wanted = max(_QUANTIZER_SAMPLE, _VECTORS_PER_CENTROID * _max_centroids(index))
    rows = np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)
    sample = np.empty((len(rows), index.d), np.float32)
    start = 0
    for shard in shards:
        here = (start <= rows) & (rows < start + len(shard))
        sample[here] = shard[rows[here] - start]
        start += len(shard)
    return sample


def _exact_rows(index: Any, vectors: NDArray[np.float32], top_k: int) -> list[list[tuple[int, float]]]:
    import faiss

    stored = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    fetched = min(top_k + _EXTRA_CANDIDATES, index.ntotal)
    found = []
    for vector, scores, rows in zip(vectors, *index.search(vectors, fetched), strict=True):
        while True:
            candidates = stored[rows].astype(np.float64)
            # Summed over the last axis, each row by itself: the same for any number of rows.
            exact = (candidates * vector).sum(axis=1)
            ranked = _ranked(rows, exact.astype(np.float32), top_k)
            # The score of a row that was not fetched is at most the last score of FAISS, up to rounding.
            norm = np.linalg.norm(candidates, axis=1).max() * np.linalg.norm(vector)
            if len(rows) == index.ntotal or ranked[-1][1] > scores[-1] + index.d * 2.0**-24 * norm:
                break
            more = index.search(vector[None], min(4 * len(rows), index.ntotal))
            scores, rows = more[0][0], more[1][0]
        found.append(ranked)
    return found


def _ranked(rows: NDArray[np.int64], scores: NDArray[np.float32], top_k: int) -> list[tuple[int, float]]:
    order = np.lexsort((rows, -scores))[:top_k]
    return list(zip(rows[order].tolist(), scores[order].tolist(), strict=True))


def _reason(error: Exception) -> str:
    """Return FAISS's message without the location in its source."""
    return _SOURCE_LOCATION.sub("", one_line(error))
