"""Training on passages shaped as real ones are, and on real ones, with models of all kinds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from conftest import LONG_PASSAGE, PASSAGES, TAGGED_PASSAGE
from support.fits import curves, fit, results

from calibadv.retrieval.index.open import open_corpus
from calibadv.runs.rollouts import read_rollouts

THREE_STEPS = ("--model.rollout_steps", "3", "--rollouts.every_n_rollout_steps", "1")
SHORT = ("--model.protocol.max_turn_tokens", "24", "--model.protocol.max_rollout_tokens", "600")
BYTE_LEVEL = ["qwen2", "qwen3", "llama"]


@pytest.fixture(params=["own", "hotpotqa"])
def corpus(request: pytest.FixtureRequest) -> Path:
    """Passages of our own; 994 of HotpotQA where they are at hand. The questions lie beside them."""
    if request.param == "own":
        folder: Path = request.getfixturevalue("own_passages")
        return folder / "corpus.jsonl.gz"
    shared: Path = request.getfixturevalue("shared")
    return shared / "data" / "hotpotqa_small" / "corpus.jsonl"


@pytest.fixture
def data(corpus: Path) -> tuple[str, ...]:
    """The corpus and its questions, as options."""
    questions = corpus.with_name(corpus.name.replace("corpus", "questions"))
    files = {"model.retriever.corpus": corpus, "data.train": questions, "data.validation": questions}
    return tuple(f"--{name}={path}" for name, path in files.items())


@pytest.mark.parametrize("kind", ["embedded", *BYTE_LEVEL, "no_pad"])
def test_models_of_all_kinds_train_on_real_passages(
    kind: str, data: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    policy = "embedded" if kind == "embedded" else str(request.getfixturevalue(f"{kind}_folder"))
    words = (f"--model.policy={policy}", *data, *THREE_STEPS, *SHORT)
    assert fit(tmp_path, "run", *words, base="local") == 0
    shown = curves(tmp_path / "run")
    assert list(shown["rollout/truncated"]) == [1, 2, 3]
    assert sum(results(tmp_path / "run")["statuses"].values()) == 3 * 4
    # Whatever a model that knows nothing writes: no difference in reward, no gradient; a difference, a gradient.
    tied, norms = shown["credit/tied_groups"], shown["stability/grad_norm"]
    assert list(tied) == list(norms) == [1, 2, 3]
    for step, norm in norms.items():
        assert math.isfinite(norm)
        assert (norm == 0) == (tied[step] == 1)


# Two samples of each question: one that the reward likes, one that it does not. The environment writes <think>.
SEARCH = "I look it up. </think> <search> Christopher Nolan director film </search>"
ANSWERS = ["I know. </think> <answer> yes </answer>", "I know. </think> <answer> no </answer>"]


@pytest.fixture
def scripted(data: tuple[str, ...], tmp_path: Path) -> tuple[str, ...]:
    overlay = tmp_path / "scripted.yaml"
    replies = [[SEARCH, answer] for answer in ANSWERS]
    overlay.write_text(
        f"model: {{engine: {{class_path: ScriptedEngine, init_args: {{default: {replies}}}}}, "
        "reward: {class_path: support.fits.StartsWithY}}"
    )
    return ("--config", str(overlay), *data, *THREE_STEPS)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_a_difference_in_reward_gives_a_gradient(
    kind: str, scripted: tuple[str, ...], corpus: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_folder")
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    words = (*scripted, f"--model.policy={folder}", "--config", "calibrators/calibadv")
    assert fit(tmp_path, "run", *words, base="local") == 0
    shown = curves(tmp_path / "run")
    assert set(shown["credit/tied_groups"].values()) == {0.0}
    norms = shown["stability/grad_norm"]
    assert list(norms) == [1, 2, 3]
    assert all(0 < norm < math.inf for norm in norms.values())
    assert set(shown["reward/score"].values()) == {0.5}
    rollouts = list(read_rollouts(tmp_path / "run" / "rollouts" / "train-step-000003.jsonl"))
    assert {str(rollout.status) for rollout in rollouts} == {"answered"}
    passages = {document.id: document for document in open_corpus(corpus)}
    for rollout in rollouts:
        found = rollout.turn_documents[0]
        assert len(found) == 3
        assert list(found) == [passages[document.id] for document in found]
        if "long" in passages:
            assert {document.id for document in found} == {"long", "tags", "3"}


def test_long_and_tagged_passages_are_read_as_they_are(own_passages: Path) -> None:
    documents = {document.id: document for document in open_corpus(own_passages / "corpus.jsonl.gz")}
    assert list(documents) == ["long", "tags", "3", "4", "5"]
    assert len(LONG_PASSAGE) == 3500
    assert documents["long"].text == LONG_PASSAGE
    assert documents["tags"].text == TAGGED_PASSAGE
    assert documents["3"].title == '"Łódź" Nights'
    assert (documents["4"].title, documents["4"].text) == ("", PASSAGES[3]["contents"])


def test_rollouts_that_outgrow_their_budget_are_truncated(
    scripted: tuple[str, ...], llama_folder: Path, tmp_path: Path
) -> None:
    """The prompt and the search fit 520 tokens, the passages do not: they are neither shown nor recorded."""
    words = (*scripted, f"--model.policy={llama_folder}", "--model.protocol.max_rollout_tokens", "520")
    assert fit(tmp_path, "run", *words, base="local") == 0
    assert set(curves(tmp_path / "run")["rollout/truncated"].values()) == {1.0}
    assert results(tmp_path / "run")["statuses"] == {"truncated": 12}
    for rollout in read_rollouts(tmp_path / "run" / "rollouts" / "train-step-000001.jsonl"):
        assert [segment.source for segment in rollout.segments] == ["policy"]
