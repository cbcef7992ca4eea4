"""From questions to an agent that answers, by the commands of docs/real-model.md, on the embedded policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.fits import SMALL

from calibadv.cli.main import main
from calibadv.runs.rollouts import read_rollouts
from calibadv.world import policy_folder


def run(*words: str | Path) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    run("world", "export", "--out", folder / "world")
    run("index", "--corpus", folder / "world" / "corpus.jsonl", "--out", folder / "index", "--backend", "bm25")
    return folder


def demonstrate(world: Path, out: Path, *words: str) -> None:
    questions = ("--questions", world / "world" / "train.jsonl", "--index", world / "index")
    run("demonstrate", *questions, "--out", out, "--policy", policy_folder(), *words)


def test_the_whole_chain(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demonstrate(world, tmp_path / "demos.jsonl", "--count", "40")
    assert "40 demonstrations of 40 questions" in capsys.readouterr().out

    validation = ("--data.validation", world / "world" / "validation.jsonl", "--data.validation_questions", "4")
    index = ("--model.retriever.index", world / "index", "--model.retriever.corpus", "null")
    limits = ("--model.protocol.max_turn_tokens", "64", "--run.root", tmp_path)
    configs = ("--config", "sft", "--config", "quickstart", *validation, *index, *limits)
    run("sft", *configs, "--data.train", tmp_path / "demos.jsonl", "--data.batch_size", "20", "--run.name", "warm")
    run("export", tmp_path / "warm", "--out", tmp_path / "start")

    configs = ("--config", "quickstart", "--config", "calibrators/calibadv", *SMALL, *validation, *index, *limits)
    train = ("--data.train", world / "world" / "train.jsonl", "--model.policy", tmp_path / "start")
    run("fit", *configs, *train, "--model.rollout_steps", "2", "--run.name", "rl")
    run("export", tmp_path / "rl", "--out", tmp_path / "agent")
    capsys.readouterr()

    run("ask", "--model", tmp_path / "agent", "--index", world / "index", "--json", "what is the capital of Osna ?")
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert answer["segments"]
    steps = json.loads((tmp_path / "rl" / "results.json").read_text())["rollout_step"]
    assert steps == 2


def test_demonstrations_from_a_run(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (world / "world" / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:12]), encoding="utf-8")
    words = ("--config", "quickstart", "--data.test", tmp_path / "few.jsonl", "--run.root", tmp_path)
    run("predict", *words, "--run.name", "sampled", "--samples", "4", "--temperature", "1")
    run("demonstrate", "--from", tmp_path / "sampled", "--min_score", "1", "--out", tmp_path / "best.jsonl")
    output = capsys.readouterr().out
    best = list(read_rollouts(tmp_path / "best.jsonl"))
    assert best
    assert all(rollout.score == 1.0 and rollout.format_valid for rollout in best)
    assert "a lower score" in output


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--index", "{index}"], "give either --questions and --index, or --from"),
        (["--questions", "{bare}", "--index", "{index}"], "no demonstration is left"),
        (["--questions", "{train}"], "there is nothing to search; give --index DIR"),
        (["--questions", "{train}", "--index", "{index}", "--count", "0"], "count is 0; it must be at least 1"),
        (["--questions", "{train}", "--index", "{index}", "--wrong_turns", "2"], "wrong_turns is 2.0; it must be from"),
        (["--questions", "{train}", "--index", "{index}", "--policy", "nowhere"], "'nowhere' is not a folder"),
        (["--from", "nowhere"], "rollout file 'nowhere' does not exist"),
    ],
)
def test_bad_input_is_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"id": "a", "question": "Who?", "golden_answers": ["x"]}\n', encoding="utf-8")
    places = {"index": world / "index", "train": world / "world" / "train.jsonl", "bare": bare}
    out = tmp_path / "out.jsonl"
    assert main(["demonstrate", "--out", str(out), *(word.format(**places) for word in words)]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_prompt_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run("prompt", "--config", "quickstart")
    output = capsys.readouterr().out
    assert "? <think>   <- the policy writes from here" in output
    assert "14 tokens, all written by the environment, <think> included; 498 of protocol.max_rollout_tokens" in output
    assert main(["prompt", "--config", "local", "--model.policy", "embedded"]) == 2
    assert "there is no question to show the prompt of" in capsys.readouterr().err
