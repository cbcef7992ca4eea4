"""Supervised fine-tuning: its loss, its order, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from support.agents import DOCUMENTS, retriever
from support.fits import curves, results
from support.records import rollout
from torch.nn import functional as F

from calibadv.cli.main import main
from calibadv.demonstrations.play import play
from calibadv.engines import TransformersEngine
from calibadv.errors import UserError
from calibadv.policy.loading import load_policy
from calibadv.protocol import SearchProtocol
from calibadv.rewards import F1
from calibadv.runs.rollouts import write_rollouts
from calibadv.sft import Demonstrations, SupervisedModule
from calibadv.types import Question, Rollout

PROTOCOL = SearchProtocol(template="short", max_turn_tokens=60, max_rollout_tokens=400)


def demonstrations(count: int, protocol: SearchProtocol = PROTOCOL) -> list[Rollout]:
    """Each searches once and answers."""

    def script(number: int) -> Any:
        opening = "" if protocol.opening else "<think>"
        yield f"{opening} look number {number} up </think> <search> capital {number} </search>"
        yield f"{opening} it says so </think> <answer> Prague {number} </answer>"

    return [
        play(script(n), Question(f"q{n}", f"what is {n}?", ["Prague"]), lambda _: DOCUMENTS[:1], protocol)
        for n in range(count)
    ]


def module(folder: Path, **settings: Any) -> SupervisedModule:
    given = {
        "protocol": PROTOCOL,
        "retriever": retriever(),
        "learning_rate": 1e-3,
        "micro_batch_tokens": 200,
        **settings,
    }
    return SupervisedModule(str(folder), TransformersEngine(), F1(), **given)


def trainer(folder: Path) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )


def by_hand(folder: Path, shown: Sequence[Rollout], rest_weight: float) -> float:
    """The mean of the cross-entropy of each token, one demonstration at a time, by transformers' own logits."""
    policy = load_policy(str(folder))
    total = weights = 0.0
    for one in shown:
        ids = list(PROTOCOL.prompt_ids(one.question.question, policy.tokenizer))
        of_policy = [False] * len(ids)
        for segment in one.segments:
            own = policy.tokenizer.encode(segment.text)
            ids += own
            of_policy += [segment.source == "policy"] * len(own)
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = policy.model(input_ids=tokens).logits[0, :-1]
        losses = F.cross_entropy(logits, tokens[0, 1:], reduction="none")
        each = torch.tensor([1.0 if own else rest_weight for own in of_policy[1:]])
        total += float((losses * each).sum())
        weights += float(each.sum())
    return total / weights


@pytest.mark.parametrize("rest_weight", [0.0, 0.25])
def test_the_loss_is_the_weighted_mean_over_the_tokens(llama_folder: Path, tmp_path: Path, rest_weight: float) -> None:
    shown = demonstrations(4)
    losses: list[float] = []

    class Losses(SupervisedModule):
        def log_at_step(self, metrics: dict[str, float]) -> None:
            losses.append(metrics["sft/loss"])

    settings: dict[str, Any] = {"learning_rate": 0.0, "weight_decay": 0.0, "micro_batch_tokens": 200}
    made = Losses(
        str(llama_folder), TransformersEngine(), F1(), PROTOCOL, retriever(), rest_weight=rest_weight, **settings
    )
    trainer(tmp_path).fit(made, Demonstrations(shown, 2))
    expected = [by_hand(llama_folder, part, rest_weight) for part in (shown[:2], shown[2:])]
    assert losses == pytest.approx(expected, rel=1e-4)


def test_it_learns(llama_folder: Path, tmp_path: Path) -> None:
    shown = demonstrations(2)
    made = module(llama_folder, learning_rate=3e-3)
    trainer(tmp_path).fit(made, Demonstrations(shown * 20, 2))
    made.model.save_pretrained(tmp_path / "after")
    made.policy.tokenizer.backend.save_pretrained(tmp_path / "after")
    assert by_hand(tmp_path / "after", shown, 0.0) < 0.5 * by_hand(llama_folder, shown, 0.0)


def test_what_cannot_be_trained_on_is_left_out(
    llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, other = demonstrations(2)
    long = replace(other, question=replace(other.question, question="word " * 500))
    first, *rest = other.segments
    special = replace(other, segments=(replace(first, text=f"{first.text}<|endoftext|>"), *rest))
    made = module(llama_folder)
    data = Demonstrations([good, long, special], 2)
    data.encode(made.agent)
    assert [rollout.question.id for rollout in data.train] == ["q0"]
    assert caplog.messages == [
        "2 of 3 demonstrations are left out: 1 with more tokens than protocol.max_rollout_tokens (400), "
        "1 with a special token of the tokenizer in its text"
    ]
    with pytest.raises(UserError, match=r"^no demonstration of data\.train can be used: 1 with more tokens"):
        Demonstrations([long], 2).encode(made.agent)


def test_demonstrations_of_another_protocol_are_refused(llama_folder: Path) -> None:
    made = module(llama_folder)
    bare = demonstrations(1, SearchProtocol(prepend_think=False))
    with pytest.raises(UserError, match=r"has prepend_think False and model\.protocol has True"):
        Demonstrations(bare, 2).encode(made.agent)
    foreign = rollout((replace(demonstrations(1)[0].segments[0], text="call[capital]"),), prepend_think=True)
    with pytest.raises(UserError, match=r"valid in the language of model\.protocol"):
        Demonstrations([foreign], 2).encode(made.agent)


def sft(root: Path, name: str, file: Path, *words: str) -> int:
    """Run ``calibadv sft`` on the embedded policy."""
    given = ["--config", "sft", "--config", "quickstart", "--data.train", str(file), "--data.validation_questions", "4"]
    return main(["sft", *given, "--data.batch_size", "2", "--run.root", str(root), "--run.name", name, *words])


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "demonstrations.jsonl"
    write_rollouts(file, demonstrations(8))
    assert sft(tmp_path, "whole", file) == 0
    interrupt = "--trainer.callbacks+={class_path: support.fits.Interrupt, init_args: {step: 2}}"
    assert sft(tmp_path, "twice", file, interrupt) == 143
    assert sft(tmp_path, "twice", file, "--ckpt_path", "auto") == 0
    assert results(tmp_path / "twice") == results(tmp_path / "whole")
    assert curves(tmp_path / "twice") == curves(tmp_path / "whole")
    assert results(tmp_path / "whole")["rollout_step"] == 4
    capsys.readouterr()
    assert sft(tmp_path, "whole", file, "--ckpt_path", "auto") == 0
    assert "is finished at rollout step 4" in capsys.readouterr().out


def test_a_config_for_fit_describes_model_and_protocol_only(tmp_path: Path) -> None:
    file = tmp_path / "demonstrations.jsonl"
    write_rollouts(file, demonstrations(2))
    assert sft(tmp_path, "run", file) == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "learning_rate: 0.0001" in config  # of sft, and not of the quickstart that follows it
    assert "group_size" not in config
    assert "max_turn_tokens: 36" in config


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model.rest_weight", "2"], "model.rest_weight is 2.0; it must be from 0 to 1"),
        (["--data.epochs", "0"], "data.epochs is 0; it must be at least 1"),
        (["--model.group_size", "4"], "option --model.group_size is not accepted"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    file = tmp_path / "demonstrations.jsonl"
    write_rollouts(file, demonstrations(2))
    assert sft(tmp_path, "run", file, *words) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    (tmp_path / "empty.jsonl").touch()
    assert sft(tmp_path, "run", tmp_path / "empty.jsonl") == 2
    assert "holds no demonstration" in capsys.readouterr().err
