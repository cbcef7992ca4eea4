"""Why nothing can be learned from rollouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fits import fit
from support.records import answer, rollout, search

from calibadv.agent.diagnosis import diagnose, fault_of
from calibadv.cli.main import main
from calibadv.protocol import SearchProtocol
from calibadv.types import Rollout, RolloutStatus, Segment

PROTOCOL = SearchProtocol(prepend_think=False)


def said(text: str, status: RolloutStatus = RolloutStatus.INVALID) -> Rollout:
    return rollout((Segment("policy", text, 3),), status=status)


RIGHT = rollout(search("d"), answer("gold"), score=1.0)
WRONG = rollout(search("d"), answer("no"), score=0.0)


def test_rollouts_to_learn_from_have_no_diagnosis() -> None:
    assert diagnose([RIGHT, WRONG], PROTOCOL, 3) is None
    assert diagnose([RIGHT, *[said("x")] * 9], PROTOCOL, 3) is None  # 10 %


def test_rollouts_that_are_not_valid() -> None:
    found = diagnose([RIGHT, *[said("Prague.")] * 10], PROTOCOL, 3)
    assert found is not None
    assert found.problems == ("1 of 11 rollouts are valid",)
    assert found.statuses == {"invalid": 10, "answered": 1}
    assert found.faults == {"no tag": 10}
    assert found.example["text"] == "Prague."
    assert any("calibadv sft" in remedy for remedy in found.remedies)


def test_a_policy_that_does_not_search() -> None:
    found = diagnose([said("<think>a</think><answer>b</answer>")], PROTOCOL, 0)
    assert found is not None
    assert found.problems == ("0 of 1 rollouts are valid", "none searches")


def test_groups_that_tie() -> None:
    found = diagnose([RIGHT, RIGHT, WRONG, WRONG], PROTOCOL, 1)
    assert found is None  # one question, and its rollouts differ
    found = diagnose([RIGHT, RIGHT], PROTOCOL, 1)
    assert found is not None
    assert found.problems == ("all rollouts of each question score the same, so that every advantage is 0",)


@pytest.mark.parametrize(
    ("shown", "fault"),
    [
        (said("It is Prague."), "no tag"),
        (said("<answer>b</answer><think>a</think>"), "text after the action"),
        (said("<search>b</search>"), "tags that are missing or in another order"),
        (said("<think>a and on and on", RolloutStatus.TRUNCATED), "a message that is cut off"),
        (said("<think>a</think><answer>b</answer>"), "an answer without a search"),
        (rollout(search("d"), search("e")[:1], status=RolloutStatus.OUT_OF_TURNS), "no answer"),
    ],
)
def test_what_was_written_instead(shown: Rollout, fault: str) -> None:
    assert fault_of(shown, PROTOCOL) == fault


def test_a_run_says_it_at_step_0(tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model with random weights writes no tag."""
    words = ("--model.policy", llama_folder, "--model.rollout_steps", "1", "--model.protocol.max_turn_tokens", "8")
    assert fit(tmp_path, "run", *words) == 0
    output = capsys.readouterr().out
    assert output.count("Nothing can be learned at step 0") == 1
    assert output.count("Nothing can be learned at step 1") == 2  # of the training step, and of the validation
    diagnosis = json.loads((tmp_path / "run" / "results.json").read_text())["diagnosis"]
    assert diagnosis["problems"] == ["0 of 4 rollouts are valid", "none searches"]
    assert diagnosis["example"]["prompt"].startswith("Question:")
    assert sum(diagnosis["statuses"].values()) == 4


def test_predictions_have_samples_a_table_and_statuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test.jsonl").write_text(
        '{"id": "a", "question": "what is the mayor of Oslo ?", "golden_answers": ["x"]}\n', encoding="utf-8"
    )
    words = ["--data.test", str(tmp_path / "test.jsonl"), "--run.root", str(tmp_path), "--run.name", "run"]
    sampling = ["--samples", "3", "--temperature", "1"]
    assert main(["predict", "--config", "quickstart", *words, *sampling]) == 0
    output = capsys.readouterr().out
    assert "cover EM" in output
    assert "statuses" in output
    records = (tmp_path / "run" / "rollouts" / "predict-step-000000.jsonl").read_text().splitlines()
    assert [json.loads(record)["sample"] for record in records] == [0, 1, 2]
    assert main(["predict", "--config", "quickstart", *words[:2], "--samples", "3"]) == 2
    assert "samples is 3 and temperature 0" in capsys.readouterr().err
