"""What an index will cost, before it is built."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class IndexSize:
    """Size of a FAISS index.

    Attributes:
        fixed: bytes that do not grow with the vectors: centroids of inverted files and of product quantizers.
        per_vector: bytes of each vector; for a type of index that is not known here, those of the vector and a number.
        known: whether the type is known.
        trained: whether it can be filled without training.
        training: bytes of the vectors that it is trained on, where there are so many.
    """

    fixed: int
    per_vector: float
    known: bool
    trained: bool
    training: int


def index_size(index: Any) -> IndexSize:
    """Say how large a FAISS index will be."""
    import faiss

    fixed, per_vector = _index_bytes(faiss, index)
    known = per_vector is not None
    # Training takes at least 2 ** 16 vectors, and 64 for each centroid.
    training = max(4 * index.d << 16, 64 * fixed)
    return IndexSize(fixed, 4 * index.d + 8 if per_vector is None else per_vector, known, index.is_trained, training)


def _index_bytes(faiss: Any, index: Any) -> tuple[int, float | None]:
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):  # its matrices are small
        return _index_bytes(faiss, index.index)
    quantizer = getattr(index, "pq", None)
    codebooks = 0 if quantizer is None else 4 * index.d * quantizer.ksub
    if isinstance(index, faiss.IndexIVF):
        # Centroids; and each vector is stored with its number.
        return codebooks + 4 * index.d * index.nlist, index.code_size + 8
    if isinstance(index, faiss.IndexHNSW):
        fixed, stored = _index_bytes(faiss, index.storage)
        below, above = index.hnsw.nb_neighbors(0), index.hnsw.nb_neighbors(1)
        # Links, four bytes each: all at the lowest level, and a share of 1/M in every further one (arXiv 1603.09320).
        return fixed, None if stored is None else stored + 4 * (below + above / (above - 1)) + 12
    size = getattr(index, "code_size", None)
    return codebooks, None if size is None else float(size)


def peak_memory() -> int:
    """The most memory that this process has had resident."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
