"""FAISS indexes: exact search with ties, and files."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.kills import files_of_at_most

from calibadv.retrieval.index.faiss import build_faiss, load_faiss, nearest_rows, save_faiss


def exact_top(stored: NDArray[np.float32], vectors: NDArray[np.float32], top_k: int) -> list[list[tuple[int, float]]]:
    """Every inner product in double precision, rounded, sorted by score and row."""
    found = []
    for vector in vectors:
        scores = [np.float32((row.astype(np.float64) * vector).sum()) for row in stored]
        rows = sorted(range(len(stored)), key=lambda row: (-scores[row], row))[:top_k]
        found.append([(row, float(scores[row])) for row in rows])
    return found


@given(seed=st.integers(0, 2**32), kinds=st.integers(1, 60), count=st.integers(1, 90), top_k=st.integers(1, 100))
def test_flat_equals_the_exact_top(seed: int, kinds: int, count: int, top_k: int) -> None:
    # Few kinds of vectors are many ties, more than are fetched at first.
    random = np.random.default_rng(seed)
    stored = random.standard_normal((kinds, 19), dtype=np.float32)[random.integers(kinds, size=count)]
    vectors = random.standard_normal((25, 19), dtype=np.float32)
    vectors[3] = 0  # ties with all
    flat = build_faiss([stored[: count // 2], stored[count // 2 :]], count, 19, "Flat")
    found = nearest_rows(flat, vectors, top_k)
    assert found == exact_top(stored, vectors, top_k)
    # FAISS multiplies one query in another way than twenty.
    assert [nearest_rows(flat, vectors[[row]], top_k)[0] for row in range(25)] == found


def test_a_large_file_is_searched_where_it_lies(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).standard_normal((20_000, 16), dtype=np.float32)  # 1.28 MB
    flat = build_faiss([stored], 20_000, 16, "Flat")
    save_faiss(flat, tmp_path / "large.index")
    opened = load_faiss(tmp_path / "large.index", 20_000)
    assert nearest_rows(opened, stored[:30], 3) == nearest_rows(flat, stored[:30], 3)
    (tmp_path / "large.index").write_bytes((tmp_path / "large.index").read_bytes()[:-40_000])
    with pytest.raises(ValueError, match=r"index file '.*' does not load \(read error in : .*\); it may be cut off"):
        load_faiss(tmp_path / "large.index", 20_000)


@pytest.mark.parametrize("factory", ["IDMap,Flat", "Flat,IDMap2", "L2norm,IDMap,Flat"])
def test_a_file_with_numbers_of_its_own_is_refused(tmp_path: Path, factory: str) -> None:
    numbered = faiss.index_factory(3, factory, faiss.METRIC_INNER_PRODUCT)
    numbered.add_with_ids(np.eye(2, 3, dtype=np.float32), np.array([7, 9]))
    faiss.write_index(numbered, str(tmp_path / "own.index"))
    with pytest.raises(ValueError, match=r"'.*own.index' stores vector ids of its own, .*; build it without IDMap"):
        load_faiss(tmp_path / "own.index", 2)


def test_an_index_of_faiss_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    flat = build_faiss([np.ones((20, 8), np.float32)], 20, 8, "Flat")
    save_faiss(flat, tmp_path / "whole")
    # The last bytes, which are in a buffer until the file is closed.
    with files_of_at_most((tmp_path / "whole").stat().st_size - 1), pytest.raises(OSError, match="File too large"):
        save_faiss(flat, tmp_path / "cut")
