"""What a user sees while a run goes on: a bar, one line per validation, and a table where there is nothing else."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

_COLUMNS = ("score", "f1", "em", "cover_em", "format_valid", "searches", "count")


class Progress(Callback):
    """Show progress on the terminal; where there is none, only the lines of the validations are printed."""

    def __init__(self) -> None:
        self.console = Console()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._last = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the bar."""
        total, done = pl_module.rollout_steps, pl_module.rollout_step
        self._task = self._bar.add_task("training", total=total, completed=done, figures="")
        self._start(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar by one rollout step."""
        output = outputs["output"]
        figures = f"score {output.metrics.get('reward/score', 0.0):.2f}  {sum(output.seconds.values()):.1f} s/step"
        assert self._task is not None
        self._bar.update(self._task, completed=output.step, figures=figures)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the bar of an evaluation outside of training."""
        if trainer.state.fn != "fit":
            self._start_evaluation(trainer, sum(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Move the bar of an evaluation."""
        if trainer.state.fn != "fit":
            self._advance()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print one line in training, a table otherwise."""
        if trainer.state.fn != "fit":
            self._finish_evaluation(trainer, pl_module)
        elif trainer.is_global_zero:
            figures = "  ".join(f"{n} {v:.3f}" for n, v in pl_module.evaluation.items() if n in _COLUMNS[:-1])
            self.console.print(f"step {pl_module.rollout_step:>4}  {figures}", highlight=False, soft_wrap=True)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the bar."""
        self._start_evaluation(trainer, sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Move the bar."""
        self._advance()

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the table."""
        self._finish_evaluation(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the bar."""
        self._start_evaluation(trainer, sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Move the bar."""
        self._advance()

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the bar away."""
        self._bar.stop()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the bar away."""
        self._bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Take the bar away."""
        self._bar.stop()

    def _start(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar.start()

    def _start_evaluation(self, trainer: Trainer, batches: float) -> None:
        self._task = self._bar.add_task("questions", total=batches, figures="")
        self._start(trainer)

    def _advance(self) -> None:
        assert self._task is not None
        self._bar.advance(self._task)

    def _finish_evaluation(self, trainer: Trainer, pl_module: Any) -> None:
        self._bar.stop()
        if trainer.is_global_zero:
            self.console.print(evaluation_table(pl_module.evaluation))


def evaluation_table(metrics: dict[str, float]) -> Table:
    """Lay out the figures of an evaluation.

    Args:
        metrics: of ``evaluation_metrics``.

    Returns:
        One row for all questions, and one per data source.
    """
    table = Table("questions", *(name.replace("_", " ") for name in _COLUMNS))
    sources = dict.fromkeys(name.rpartition("/")[0] for name in metrics)
    for source in sources:
        prefix = f"{source}/" if source else ""
        cells = [metrics.get(prefix + name) for name in _COLUMNS]
        shown = ["-" if value is None else f"{value:.3f}" for value in cells[:-1]]
        table.add_row(source or "all", *shown, f"{cells[-1] or 0:.0f}")
    return table
