"""The display of a run: a bar, one line per validation, and a table where there is nothing else."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from calibadv.training.metrics import without_result

_FIGURES = ("score", "f1", "em", "cover_em", "format_valid", "searches")
# Time left is estimated from the steps within so many seconds; a step with a large model may take minutes.
_SPEED_PERIOD = 3600.0
_HEADINGS = {"cover_em": "cover EM", "format_valid": "valid", "f1": "F1", "em": "EM", "count": "questions"}


class Progress(Callback):
    """Show progress on the terminal; where there is none, only the lines of the validations are printed."""

    def __init__(self) -> None:
        self.console = Console()
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            transient=True,
            expand=True,
            speed_estimate_period=_SPEED_PERIOD,
        )
        self._task = TaskID(0)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._start(trainer, "rollouts", total=pl_module.rollout_steps, done=pl_module.rollout_step)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._say("rollouts")

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Any) -> None:
        self._say("update")

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        output = outputs["output"]
        score = output.metrics.get("reward/score")
        shown = "" if score is None else f"score {score:.2f}  "
        seconds = sum(output.seconds.values())
        self._bar.update(self._task, completed=output.step, figures=f"{shown}{seconds:.1f} s/step")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self._say("validation")
        else:
            self._start(trainer, "questions", total=sum(trainer.num_val_batches))

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.state.fn != "fit":
            self._bar.advance(self._task)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            self.on_test_end(trainer, pl_module)
        elif trainer.is_global_zero and not trainer.sanity_checking:
            figures = [f"{n} {v:.3f}" for n, v in pl_module.evaluation.items() if n in _FIGURES]
            shown = "  ".join(filter(None, (*figures, without_result(pl_module.evaluation))))
            self.console.print(f"step {pl_module.rollout_step:>4}  {shown}", highlight=False, soft_wrap=True)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._start(trainer, "questions", total=sum(trainer.num_test_batches))

    @override
    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._bar.advance(self._task)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop()
        if trainer.is_global_zero:
            self.console.print(evaluation_table(pl_module.evaluation))

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._start(trainer, "questions", total=sum(trainer.num_predict_batches))

    @override
    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._bar.advance(self._task)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop()

    on_train_end = on_predict_end

    @override
    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _start(self, trainer: Trainer, doing: str, total: float, done: int = 0) -> None:
        self._task = self._bar.add_task(doing, total=total, completed=done, figures="")
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar.start()

    def _say(self, doing: str) -> None:
        self._bar.update(self._task, description=doing)

    def _stop(self) -> None:
        if self._bar.live.is_started:  # rich would print an empty line
            self._bar.stop()


def evaluation_table(metrics: dict[str, float]) -> Table:
    """Lay out the figures of an evaluation."""
    missing = without_result(metrics)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=missing or None)
    table.add_column("source")  # the one that gives way on a narrow terminal
    for name in (*_FIGURES, "count"):
        table.add_column(_HEADINGS.get(name, name), justify="right", no_wrap=True)
    sources = dict.fromkeys(name.rpartition("/")[0] for name in metrics)
    for source in sources:
        prefix = f"{source}/" if source else ""
        cells = [metrics.get(prefix + name) for name in _FIGURES]
        shown = ["-" if value is None else f"{value:.3f}" for value in cells]
        shown_source = Text(source or "all", no_wrap=True, overflow="ellipsis")
        table.add_row(shown_source, *shown, f"{metrics.get(prefix + 'count', 0):.0f}")
    return table
