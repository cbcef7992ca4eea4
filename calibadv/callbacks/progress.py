"""The display of a run: a bar, one line per validation, and a table where there is nothing else."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.box import HEAVY, SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from calibadv.agent.diagnosis import Diagnosis
from calibadv.training.metrics import without_result

_FIGURES = ("score", "f1", "em", "cover_em", "format_valid", "searches")
# Time left is estimated from the steps within so many seconds; a step with a large model may take minutes.
_SPEED_PERIOD = 3600.0
# Characters of the example of a diagnosis.
_EXAMPLE = 1200
# Figure of a training step that is shown, and its name.
_TRAINED = {"reward/score": "score", "sft/loss": "loss"}
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
        self._told: tuple[str, ...] = ()  # problems of training that are on the terminal

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._start(trainer, pl_module.first_stage, total=pl_module.rollout_steps, done=pl_module.rollout_step)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._say(pl_module.first_stage)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Any) -> None:
        self._say("update")

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        output = outputs["output"]
        shown = "".join(f"{_TRAINED[name]} {value:.2f}  " for name, value in output.metrics.items() if name in _TRAINED)
        seconds = sum(output.seconds.values())
        self._bar.update(self._task, completed=output.step, figures=f"{shown}{seconds:.1f} s/step")
        kinds = () if pl_module.diagnosis is None else pl_module.diagnosis.remedies
        if kinds and kinds != self._told:
            self._print_diagnosis(trainer, pl_module)
        self._told = kinds

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
            self._print_diagnosis(trainer, pl_module)

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
            statuses = ", ".join(f"{status} {number}" for status, number in pl_module.statuses.most_common())
            self.console.print(f"statuses    {statuses}", highlight=False, soft_wrap=True)
            self._print_diagnosis(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._start(trainer, "questions", total=sum(trainer.num_predict_batches))

    @override
    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._bar.advance(self._task)

    on_predict_end = on_test_end

    @override
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _start(self, trainer: Trainer, doing: str, total: float, done: int = 0) -> None:
        self._task = self._bar.add_task(doing, total=total, completed=done, figures="")
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar.start()

    def _say(self, doing: str) -> None:
        self._bar.update(self._task, description=doing)

    def _print_diagnosis(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and pl_module.diagnosis is not None:
            self.console.print(diagnosis_block(pl_module.diagnosis))

    def _stop(self) -> None:
        if self._bar.live.is_started:  # rich would print an empty line
            self._bar.stop()


def diagnosis_block(diagnosis: Diagnosis) -> Panel:
    """Lay out why nothing can be learned from some rollouts."""
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    rows.add_row("problem", " and ".join(diagnosis.problems))
    rows.add_row("statuses", _counts(diagnosis.statuses))
    if diagnosis.faults:
        rows.add_row("wrote", _counts(diagnosis.faults))
    rows.add_row("prompt", Text(_shortened(diagnosis.example["prompt"])))
    rows.add_row("rollout", Text(_shortened(diagnosis.example["text"])))
    for number, remedy in enumerate(diagnosis.remedies):
        rows.add_row("" if number else "next", Text(remedy))
    title = f"Nothing can be learned at step {diagnosis.step}"
    return Panel(rows, title=title, title_align="left", box=HEAVY, border_style="yellow", padding=(0, 1))


def _counts(numbers: dict[str, int]) -> str:
    total = sum(numbers.values())
    return ", ".join(f"{name} {number} ({number / total:.0%})" for name, number in numbers.items())


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _EXAMPLE else f"{text[: _EXAMPLE // 2]} [...] {text[-_EXAMPLE // 2 :]}"


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
