"""What all retrievers rank by: larger scores first, ties in the order of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calibadv.errors import UserError


def check_top_k(top_k: int) -> None:
    """Refuse a number of documents below 1."""
    if top_k < 1:
        raise UserError(f"top_k is {top_k}; it must be at least 1")


def check_search(queries: Sequence[str], top_k: int) -> None:
    """Refuse what no retriever can be asked."""
    if isinstance(queries, str):
        raise UserError(f"queries is the text {queries!r:.60}; it must be a list of texts: put it in brackets")
    check_top_k(top_k)


def best_rows(scores: NDArray[np.float32], top_k: int) -> list[int]:
    """Rows with the largest positive scores, best first, ties in the order of the rows."""
    # Few documents share a word with a query: selecting among those is many times faster than among all.
    rows = np.flatnonzero(scores > 0)
    if len(rows) > top_k:
        # Keep every row that ties with the last one, then sort stably.
        threshold = np.partition(scores[rows], -top_k)[-top_k]
        rows = rows[scores[rows] >= threshold]
    order = np.argsort(-scores[rows], kind="stable")[:top_k]
    return [int(row) for row in rows[order]]
