"""A small corpus and an index of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.corpora import RECORDS, write_lines

from calibadv.retrieval.index.build import index


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_lines(tmp_path / "corpus.jsonl", *RECORDS)


@pytest.fixture
def built(tmp_path: Path, corpus: str) -> Path:
    index(corpus, tmp_path / "built", "bm25")
    return tmp_path / "built"
