"""Fixtures for all tests. Models are made once per session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from models import byte_level_folder, wordpiece_folder

from calibadv.models import Policy, load_policy
from calibadv.world import policy_folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real questions and the calibration vectors: CALIBADV_SHARED, else the folder `shared` beside the checkout."""
    named = os.environ.get("CALIBADV_SHARED")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the shared data: set CALIBADV_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The policy that ships inside the package."""
    return policy_folder()


@pytest.fixture(scope="session")
def embedded_policy() -> Policy:
    """The embedded policy, loaded. Shared by all tests: take a copy of the model before training it."""
    return load_policy("embedded")


@pytest.fixture(scope="session")
def models_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def qwen2_folder(models_root: Path) -> Path:
    """Byte-level BPE, tags of several tokens, with a chat template."""
    return byte_level_folder(models_root / "qwen2", "qwen2", chat_template=True)


@pytest.fixture(scope="session")
def qwen3_folder(models_root: Path) -> Path:
    """Byte-level BPE, tags of several tokens, with a chat template."""
    return byte_level_folder(models_root / "qwen3", "qwen3", chat_template=True)


@pytest.fixture(scope="session")
def llama_folder(models_root: Path) -> Path:
    """Byte-level BPE, tags of several tokens, without a chat template."""
    return byte_level_folder(models_root / "llama", "llama")


@pytest.fixture(scope="session")
def newline_folder(models_root: Path) -> Path:
    """Byte-level BPE in which a tag's closing ``>`` and a newline are one token."""
    return byte_level_folder(models_root / "newline", "llama", newline_merge=True)


@pytest.fixture(scope="session")
def no_pad_folder(models_root: Path) -> Path:
    """Byte-level BPE without a padding token."""
    return byte_level_folder(models_root / "no_pad", "llama", pad_token=False)


@pytest.fixture(scope="session")
def opinionated_folder(models_root: Path) -> Path:
    """A folder whose generation config would change the sampled distribution."""
    generation = {"repetition_penalty": 1.1, "top_p": 0.8, "top_k": 20}
    return byte_level_folder(models_root / "opinionated", "qwen2", generation=generation)


@pytest.fixture(scope="session")
def wordpiece(models_root: Path) -> Path:
    """WordPiece, which takes the tags apart and lower-cases."""
    return wordpiece_folder(models_root / "wordpiece")
