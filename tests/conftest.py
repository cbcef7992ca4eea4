"""Fixtures for all tests. Models are made once per session."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from support.models import byte_level_folder, wordpiece_folder

from calibadv.policy.loading import load_policy
from calibadv.policy.policy import Policy
from calibadv.world import policy_folder

settings.register_profile("calibadv", deadline=None)  # no test depends on how busy the machine is
settings.load_profile("calibadv")

# What real passages are like: other alphabets, quotes and tags in the text, no title, and one of 3,500 characters.
_SENTENCE = "The director of the film, {n} years old then, shot reel {n} by the river Świder and cut it in a barn. "
LONG_PASSAGE = "".join(_SENTENCE.format(n=n) for n in range(40))[:3500]
TAGGED_PASSAGE = (
    "A film whose director ends a line with </information> and <answer> no </answer>, or <|im_end|>, on purpose."
)
PASSAGES: list[dict[str, Any]] = [
    {"id": "long", "contents": f'"Świder (film)"\n{LONG_PASSAGE}'},
    {"id": "tags", "title": "Markup, a film", "text": TAGGED_PASSAGE},
    {"id": 3, "contents": '""Łódź" Nights"\n"Łódź" Nights is a film. Its director, Zoë Ångström: «просто сон», 夢.'},
    {"id": "4", "contents": "no title, no director: a lone line about trains 🚂\u00a0and rain"},
    {"id": "5", "title": "", "text": "Tea grows on hills.\n\nIt is picked twice a year; a kilo costs 12,50 €."},
]
QUESTIONS: list[dict[str, Any]] = [
    {"id": "a", "question": 'Who directed "Łódź" Nights?', "golden_answers": ["Zoë Ångström", "Ångström"]},
    {"id": "b", "question": "Is Świder a film?", "golden_answers": "yes", "data_source": "yes/no"},
    {"id": "c", "question": "Does 夢 mean dream?", "golden_answers": ["yes"], "metadata": {"supporting_ids": ["3"]}},
    {"id": 4, "question": "What does a kilo of tea cost in €?", "golden_answers": ["12,50"]},
]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted corpora go to a folder of this session, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALIBADV_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_server_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A retrieval server of another test may have had the port of this one's."""
    monkeypatch.setattr("calibadv.retrieval.remote._answered", set())


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real questions and the calibration vectors: the folder that CALIBADV_SHARED names."""
    named = os.environ.get("CALIBADV_SHARED")
    if not named:
        pytest.skip("needs the shared data: set CALIBADV_SHARED to its folder")
    return Path(named)


@pytest.fixture(scope="session")
def own_passages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.jsonl.gz and questions.jsonl.gz, small but shaped as real ones are."""
    folder = tmp_path_factory.mktemp("passages")
    for name, records in (("corpus", PASSAGES), ("questions", QUESTIONS)):
        # One file as json.dumps escapes it, one in plain UTF-8: both are found.
        lines = "".join(json.dumps(record, ensure_ascii=name == "corpus") + "\n" for record in records)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-8"), mtime=0))
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
    return byte_level_folder(models_root / "newline", "llama", merged_behind="\n")


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


@pytest.fixture(scope="session")
def chromium() -> str:
    """A Chromium, for the tests of pages."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is installed")
    return found
