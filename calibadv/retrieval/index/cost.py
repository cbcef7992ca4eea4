"""Estimate of the size of an index before it is built."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class IndexCost:
    """Resources to build and store an index, besides the corpus."""

    index_bytes: int  # on disk
    temporary_bytes: int  # on disk, of files that are removed at the end
    memory_bytes: int  # peak of the process
    seconds: float
    unknown: str = ""  # costs that the figures do not include, for the user


@dataclass(frozen=True, slots=True)
class IndexSize:
    """Size of a FAISS index."""

    fixed: int  # bytes that do not depend on the number of vectors: centroids of IVF lists and of product quantizers
    per_vector: float  # bytes per vector; for an unknown type of index, those of the vector and an id
    known: bool  # True if the size of the type is known
    trained: bool  # True if vectors can be added without training
    training: int  # bytes of the vectors for training, if the corpus has as many


def index_size(index: Any) -> IndexSize:
    """Return the size of a FAISS index from its parameters."""
    import faiss

    fixed, per_vector = _index_bytes(faiss, index)
    known = per_vector is not None
    # Training uses at least 2 ** 16 vectors, and 64 for each centroid.
    training = max(4 * index.d << 16, 64 * fixed)
    return IndexSize(fixed, 4 * index.d + 8 if per_vector is None else per_vector, known, index.is_trained, training)


def _index_bytes(faiss: Any, index: Any) -> tuple[int, float | None]:
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):  # the matrices of the transform are small
        return _index_bytes(faiss, index.index)
    quantizer = getattr(index, "pq", None)
    codebooks = 0 if quantizer is None else 4 * index.d * quantizer.ksub
    if isinstance(index, faiss.IndexIVF):
        # The centroids of the lists; each vector is stored with its id.
        return codebooks + 4 * index.d * index.nlist, index.code_size + 8
    if isinstance(index, faiss.IndexHNSW):
        fixed, stored = _index_bytes(faiss, index.storage)
        lowest, upper = index.hnsw.nb_neighbors(0), index.hnsw.nb_neighbors(1)
        # Links of four bytes: all vectors are at the lowest level, 1/M of each level at the next (arXiv 1603.09320).
        return fixed, None if stored is None else stored + 4 * (lowest + upper / (upper - 1)) + 12
    size = getattr(index, "code_size", None)
    return codebooks, None if size is None else float(size)


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
