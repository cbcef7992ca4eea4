"""Fixtures of all retrieval tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.encoders import VECTORS, word_folder


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    return str(word_folder(tmp_path / "words", VECTORS))
