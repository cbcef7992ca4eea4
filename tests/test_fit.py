"""Training on real questions and passages, with models of all kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import curves, fit, results

from calibadv.rollout_files import read_rollouts

THREE_STEPS = ("--model.rollout_steps", "3", "--rollouts.every_n_rollout_steps", "1")
SHORT = ("--model.protocol.max_turn_tokens", "24", "--model.protocol.max_rollout_tokens", "600")


@pytest.fixture
def hotpotqa(shared: Path) -> tuple[str, ...]:
    """100 questions of HotpotQA with their passages, as options."""
    corpus, questions = (shared / "data" / "hotpotqa_small" / name for name in ("corpus.jsonl", "questions.jsonl"))
    files = {"model.retriever.corpus": corpus, "data.train": questions, "data.validation": questions}
    return tuple(f"--{name}={path}" for name, path in files.items())


@pytest.mark.parametrize("kind", ["embedded", "qwen2", "qwen3", "llama", "no_pad"])
def test_models_of_all_kinds_train_on_real_passages(
    kind: str, hotpotqa: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    policy = "embedded" if kind == "embedded" else str(request.getfixturevalue(f"{kind}_folder"))
    words = (f"--model.policy={policy}", *hotpotqa, *THREE_STEPS, *SHORT)
    assert fit(tmp_path, "run", *words, base="local") == 0
    shown = curves(tmp_path / "run")
    assert list(shown["rollout/truncated"]) == [1, 2, 3]
    statuses = results(tmp_path / "run")["statuses"]
    assert sum(statuses.values()) == 3 * 4
    if kind != "embedded":
        # A random model writes no tag, so that its messages are cut, all score 0 and every group is tied: no gradient.
        assert statuses["truncated"] >= 10
        assert set(shown["credit/tied_groups"].values()) == {1.0}
        assert set(shown["stability/grad_norm"].values()) == {0.0}


# Two samples of each question: one that the reward likes, one that it does not. The environment writes <think>.
SEARCH = "I look it up. </think> <search> Christopher Nolan director film </search>"
ANSWERS = ["I know. </think> <answer> yes </answer>", "I know. </think> <answer> no </answer>"]


@pytest.fixture
def scripted(hotpotqa: tuple[str, ...], llama_folder: Path, tmp_path: Path) -> tuple[str, ...]:
    overlay = tmp_path / "scripted.yaml"
    replies = [[SEARCH, answer] for answer in ANSWERS]
    overlay.write_text(
        f"model: {{engine: {{class_path: ScriptedEngine, init_args: {{default: {replies}}}}}, "
        "reward: {class_path: runs.StartsWithY}}"
    )
    return ("--config", str(overlay), f"--model.policy={llama_folder}", *hotpotqa, *THREE_STEPS)


def test_a_difference_in_reward_gives_a_gradient(scripted: tuple[str, ...], tmp_path: Path) -> None:
    assert fit(tmp_path, "run", *scripted, "--config", "calibrators/calibadv", base="local") == 0
    shown = curves(tmp_path / "run")
    assert set(shown["credit/tied_groups"].values()) == {0.0}
    assert all(norm > 0 for norm in shown["stability/grad_norm"].values())
    assert set(shown["reward/score"].values()) == {0.5}
    rollouts = list(read_rollouts(tmp_path / "run" / "rollouts" / "train-step-000003.jsonl"))
    assert {str(rollout.status) for rollout in rollouts} == {"answered"}
    assert all(len(rollout.turn_documents[0]) == 3 for rollout in rollouts)


def test_rollouts_that_outgrow_their_budget_are_truncated(scripted: tuple[str, ...], tmp_path: Path) -> None:
    """The prompt and the search fit 520 tokens, the passages do not: they are neither shown nor recorded."""
    assert fit(tmp_path, "run", *scripted, "--model.protocol.max_rollout_tokens", "520", base="local") == 0
    assert set(curves(tmp_path / "run")["rollout/truncated"].values()) == {1.0}
    assert results(tmp_path / "run")["statuses"] == {"truncated": 12}
    for rollout in read_rollouts(tmp_path / "run" / "rollouts" / "train-step-000001.jsonl"):
        assert [segment.source for segment in rollout.segments] == ["policy"]
