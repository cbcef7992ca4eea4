"""Runs through the command line, small enough for a test, and what they leave behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from calibadv.batch import LossInputs
from calibadv.cli.main import main
from calibadv.distributed import ProcessGroup
from calibadv.interfaces import Regularizer, Reward
from calibadv.types import Metrics, Question

# Two questions of two rollouts a step, in two mini-batches; four questions of validation.
SMALL = (
    *("--data.questions_per_step", "2", "--data.validation_questions", "4"),
    *("--model.group_size", "2", "--model.mini_batches", "2"),
)


def fit(root: Path, name: str, *words: str | Path, base: str = "quickstart") -> int:
    """Run ``calibadv fit`` in this process; returns its exit status."""
    return main(["fit", "--config", base, *SMALL, "--run.root", str(root), "--run.name", name, *map(str, words)])


def results(folder: Path) -> dict[str, Any]:
    """What results.json says, but for what differs between two runs that are the same."""
    content: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in ("name", "wall_seconds", "command")}


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """The curves as TensorBoard shows them, step by step, but for times."""
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "second" not in tag]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Interrupt(Callback):
    """Send this process a signal in the middle of a rollout step.

    Args:
        step: which step.
        number: of the signal.
        times: how often to send it.
    """

    def __init__(self, step: int, number: int = 15, times: int = 1) -> None:
        self.step = step
        self.number = number
        self.times = times

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.rollout_step + 1 == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class StopsAtOnce(Callback):
    """End a run before its first rollout step."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.should_stop = True


class InFloat32(Reward):
    """A part that counts on torch's usual default."""

    def score(self, answer: str, question: Question) -> float:
        assert torch.ones(1).dtype == torch.float32
        return float(answer in question.golden_answers)


class StartsWithY(Reward):
    """Like an answer that starts with y, whatever the question."""

    def score(self, answer: str, question: Question) -> float:
        return float(answer.startswith("y"))


class Poison(Regularizer):
    """Give a single token of some micro-batches a gradient that is not finite.

    Args:
        calls: numbers of the micro-batches, from 1.
        value: what the gradient becomes.
        rank: of the process that does so.
    """

    def __init__(self, calls: list[int], value: float = float("nan"), rank: int = 0) -> None:
        self.calls = calls
        self.value = value
        self.rank = rank
        self.seen = 0

    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        self.seen += 1
        strikes = self.seen in self.calls and ProcessGroup.current().rank == self.rank
        return inputs.logprobs[0] * (self.value if strikes else 0.0), {}


class KeepWeights(Callback):
    """Keep the weights of each process at the end of training, as ``rank0.pt`` and so on in the run folder."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        weights = {name: value.detach().clone() for name, value in pl_module.model.named_parameters()}
        torch.save(weights, Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt")
