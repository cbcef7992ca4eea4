"""The examples of docs/examples, run."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.agents import protocol
from support.fits import fit
from torch import nn
from transformers import AutoTokenizer

from calibadv.agent import Agent, Draws, Environment, run_rollouts
from calibadv.batch import collate
from calibadv.calibrators import ConstantPenalty, SoftPenalty
from calibadv.engines import ScriptedEngine
from calibadv.estimators import GRPO, GiGPO
from calibadv.policy.policy import Policy
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.rewards import F1, credit_rollouts, score_rollouts
from calibadv.runs.rollouts import read_rollouts, write_rollouts
from calibadv.training.metrics import credit_metrics
from calibadv.types import Question, Rollout, RolloutStatus

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture
def custom(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("custom_environment")
    sys.modules.pop("custom_environment")


@pytest.mark.usefixtures("custom")
def test_an_agent_with_three_tools_is_trained_from_the_command_line(tmp_path: Path) -> None:
    words = ("--config", str(EXAMPLES / "custom_environment.yaml"), "--model.rollout_steps", "2")
    assert fit(tmp_path, "run", *words, "--rollouts.every_n_rollout_steps", "1") == 0
    found: set[str] = set()
    for rollout in read_rollouts(tmp_path / "run" / "rollouts" / "train-step-000002.jsonl"):
        found |= {d.id.partition("/")[0] for turn in rollout.turn_documents for d in turn or ()}
    assert found == {"works", "others"}  # no id is shared: each names its tool
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["rollout_step"] == 2


def play(custom: Any, qwen2_folder: Path, *messages: list[str]) -> list[Rollout]:
    """One rollout of question q per list of messages."""
    tokenizer = AgentTokenizer(AutoTokenizer.from_pretrained(qwen2_folder))
    policy = Policy(nn.Identity(), tokenizer)
    tools = [custom.Calculator()]
    for name, kinds in (("works", ["film"]), ("others", ["person"])):
        from calibadv.agent import SearchTool

        tools.append(SearchTool(custom.TitleSearch(kinds), name))
    rules = custom.RoutedProtocol(**vars(protocol()))
    engine = ScriptedEngine({"q": [list(samples) for samples in messages]})
    engine.sync(policy)
    agent = Agent(engine, Environment(tools), rules, tokenizer)
    draws = Draws(seed=0, step=1, samples=len(messages), temperature=1.0)
    return run_rollouts([Question("q", "how many?", ["6"])], agent, draws)


def say(think: str, action: str, text: str) -> str:
    return f"<think> {think} </think> <{action}> {text} </{action}>"


def test_a_calculator_answers_and_its_turns_are_in_no_mean_of_credit(custom: Any, qwen2_folder: Path) -> None:
    films = say("a", "search", "director of Zanora Garux")
    right = [films, say("b", "search", "2 * (1 + 2)"), say("c", "answer", "6")]
    wrong = [films, say("b", "search", "2 + 2"), say("c", "answer", "4")]
    rollouts = credit_rollouts(score_rollouts(play(custom, qwen2_folder, right, wrong), F1()))
    assert [r.status for r in rollouts] == [RolloutStatus.ANSWERED] * 2
    searched, computed = (segment for segment in rollouts[0].segments if segment.source == "environment")
    assert searched.documents is not None
    assert searched.documents[0].id == "works/film-0"
    assert (computed.documents, computed.text) == (None, "\n\n<information>6</information>\n\n")
    assert [r.step_correctness for r in rollouts] == [(1.0, None), (1.0, None)]

    batch = collate(rollouts)
    assert batch.finds_documents.tolist() == [[True, False, False]] * 2
    estimated = GRPO().estimate(batch)
    assert credit_metrics(batch, estimated)["credit/step_correctness"] == 1.0  # of the searches alone
    for calibrator in (SoftPenalty(), ConstantPenalty()):
        calibrated, _ = calibrator.calibrate(batch, estimated)
        turn = batch.turn_ids[1]
        assert not calibrated[1][turn == 0].any()  # a correct search in a wrong rollout is not punished
        assert (calibrated[1][turn == 1] == estimated[1][turn == 1]).all()  # the calculation keeps its advantage
    assert GiGPO().estimate(batch).isfinite().all()


def test_a_failed_call_fails_its_own_rollout_only(custom: Any, qwen2_folder: Path) -> None:
    def asks(query: str) -> list[str]:
        return [say("a", "search", query), say("c", "answer", "6")]

    failed, other = play(custom, qwen2_folder, asks("1 / 0"), asks("1 + 5"))
    assert (failed.status, other.status) == (RolloutStatus.SEARCH_FAILED, RolloutStatus.ANSWERED)


def test_turns_without_documents_are_kept_in_files(custom: Any, qwen2_folder: Path, tmp_path: Path) -> None:
    messages = [say("b", "search", "1 + 5"), say("c", "answer", "6")]
    rollouts = credit_rollouts(score_rollouts(play(custom, qwen2_folder, messages), F1()))
    write_rollouts(tmp_path / "rollouts.jsonl", rollouts)
    (read,) = read_rollouts(tmp_path / "rollouts.jsonl")
    assert (read.turn_documents, read.step_correctness) == ([None], (None,))


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_the_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    (metrics,) = importlib.import_module("python_api").main(str(tmp_path), rollout_steps=1)
    assert metrics["test/count"] > 0
    assert list(tmp_path.rglob("best.ckpt"))
    assert len((EXAMPLES / "python_api.py").read_text().split("def main")[1].splitlines()) < 40
