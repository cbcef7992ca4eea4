"""Rollouts to look at: JSON lines in the run folder, and a few as text beside the curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from calibadv.batch import StepOutput, turn_values
from calibadv.callbacks._utils import writers
from calibadv.errors import UserError
from calibadv.runs.folder import RunFolder
from calibadv.runs.rollouts import write_rollouts
from calibadv.types import Rollout, RolloutStatus

_STATUSES = list(RolloutStatus)  # what broke off before what is only wrong


class RolloutWriter(Callback):
    """Write rollouts into the run folder: of every N-th training step, and of every validation, test and prediction.

    Args:
        every_n_rollout_steps: Write the training rollouts of step 1 and of every so many steps.
        shown: How many of them to show as text in TensorBoard, failures and the worst scores first; 0 for none.
    """

    def __init__(self, every_n_rollout_steps: int = 10, shown: int = 4) -> None:
        if every_n_rollout_steps < 1:
            raise UserError(f"rollouts.every_n_rollout_steps is {every_n_rollout_steps}; it must be at least 1")
        if shown < 0:
            raise UserError(f"rollouts.shown is {shown}; it must be at least 0 (0 shows none)")
        self.every_n_rollout_steps = every_n_rollout_steps
        self.shown = shown
        self._evaluated: list[Rollout] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        output = outputs["output"]
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero and not folder.is_dir():
            raise UserError(f"run folder '{folder}' was removed or renamed during the run; start it again")
        due = output.step == 1 or output.step % self.every_n_rollout_steps == 0
        if due and trainer.is_global_zero:  # every process holds all rollouts
            self._write_training(trainer, output)
        pl_module.finished_step = output.step

    def _write_training(self, trainer: Trainer, output: StepOutput) -> None:
        write_training_rollouts(self._path(trainer, "train", output.step), output)
        worst = sorted(output.batch.rollouts, key=lambda r: (r.score, _STATUSES.index(r.status)))[: self.shown]
        text = "\n\n---\n\n".join(_as_markdown(rollout) for rollout in worst)
        for writer in writers(trainer) if worst else ():
            writer.add_text("rollouts/lowest_scores", text, output.step)

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluated.extend(outputs.rollouts)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            self._evaluated.clear()
        else:
            self._write(trainer, pl_module, "val")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._write(trainer, pl_module, "test")

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._write(trainer, pl_module, "predict")

    def _write(self, trainer: Trainer, pl_module: Any, split: str) -> None:
        if trainer.is_global_zero:
            write_rollouts(self._path(trainer, split, pl_module.rollout_step), self._evaluated)
        self._evaluated.clear()

    def _path(self, trainer: Trainer, split: str, step: int) -> Path:
        return RunFolder(Path(trainer.default_root_dir)).rollout_file(split, step)


def write_training_rollouts(path: Path, output: StepOutput) -> None:
    """Write the rollouts of a training step, with their advantages."""
    estimated, calibrated = (turn_values(output.batch, a) for a in (output.estimated, output.calibrated))
    write_rollouts(path, output.batch.rollouts, estimated, calibrated)


def _as_markdown(rollout: Rollout) -> str:
    answers = " / ".join(rollout.question.golden_answers)
    head = f"**{rollout.question.question}** ({answers}): score {rollout.score:.2f}, {rollout.status}"
    return "\n\n".join([head, *(_quote(segment.source, segment.text) for segment in rollout.segments)])


def _quote(source: str, text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines()
    return "\n".join([f"*{source}*", "", *(f"    {line}" for line in lines)])
