"""Ranking by scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
