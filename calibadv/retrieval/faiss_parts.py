"""What a FAISS index is made of: transforms, coarse quantizers, graphs and refinements around what stores vectors."""

from __future__ import annotations

from typing import Any


def has_numbers(index: Any) -> bool:
    """Whether an index, or a part of it, stores a number with each vector in the place of its row.

    Args:
        index: a ``faiss.Index``.

    Returns:
        True for IDMap, wherever it stands.
    """
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return has_numbers(index.index)
    if isinstance(index, faiss.IndexRefine):
        return has_numbers(index.base_index)
    return isinstance(index, faiss.IndexIDMap)


def most_centroids(index: Any) -> int:
    """The largest number of centroids that one part of an index is trained for.

    Args:
        index: a ``faiss.Index``.

    Returns:
        The number; 0 where there are none.
    """
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return most_centroids(index.index)
    if isinstance(index, faiss.IndexHNSW):
        return most_centroids(index.storage)
    if isinstance(index, faiss.IndexRefine):
        return most_centroids(index.base_index)
    quantizer = getattr(index, "pq", None)
    return max(getattr(index, "nlist", 0), 0 if quantizer is None else quantizer.ksub)


def train_plainly(index: Any) -> None:
    """Leave out polysemous training (arXiv 1609.01882), which factory strings ask for where a part is called PQ.

    It numbers the centroids anew for a filter that no search of ours uses, and takes many times as long as the rest.

    Args:
        index: a ``faiss.Index``; changed in place.
    """
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        train_plainly(index.index)
    elif isinstance(index, faiss.IndexRefine):
        train_plainly(index.base_index)
    elif hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False
