"""Progress of a study on the console: a live table, or one line per run without a terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from calibadv.study.runs import StudyRun, StudyState

_REFRESH_SECONDS = 2.0
# The time left is estimated from the whole call: shorter periods vary too much, since progress is seen at checkpoints.
_SPEED_PERIOD = 30 * 24 * 3600.0

RunProgress = dict[StudyRun, tuple[int, float | None]]


class ConsoleView:
    """Shows the progress of a study on a console."""

    def __init__(self, runs: Sequence[StudyRun], console: Console) -> None:
        self.runs = runs
        self.console = console
        self._bar = Progress(
            TextColumn("rollout steps"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
            speed_estimate_period=_SPEED_PERIOD,
        )
        self._task = TaskID(0)
        self._live: Live | None = None
        self._progress: RunProgress = {run: run.progress() for run in runs}
        self._refreshed = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the live table while the context is open, if there is a terminal."""
        total = sum(run.steps for run in self.runs)
        self._task = self._bar.add_task("", total=total, completed=self._done())
        if not self.console.is_terminal:
            left = [run for run in self.runs if not run.finished]
            if left:
                text = f"{len(left)} of {len(self.runs)} runs to do; each prints into a file such as {left[0].log}"
                self.console.print(text, soft_wrap=True)
            yield
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as self._live:
            yield

    def update(self, state: StudyState) -> None:
        """Refresh the live table, at most every two seconds."""
        if self._live is None or time.monotonic() - self._refreshed < _REFRESH_SECONDS:
            return
        self._refreshed = time.monotonic()
        self._progress |= {run: run.progress() for run in state.running}
        self._bar.update(self._task, completed=self._done())
        self._live.update(Group(arm_table(self.runs, state, self._progress), self._bar), refresh=True)

    def stopping(self, state: StudyState, at_once: bool) -> None:
        """Print the effect of a signal, while there are runs to wait for."""
        if state.running and state.stopped_by is not None:
            orderly = "each run finishes its step, then saves; once more to stop at once"
            text = f"{state.stopped_by.name}: {'stopped at once' if at_once else orderly}"
            self.console.print(text, soft_wrap=True)

    def ended(self, run: StudyRun, state: StudyState) -> None:
        """Print a line for a run that has ended; with a live table, for failed ones only."""
        self._progress[run] = run.progress()
        if run in state.failed:
            self.console.print(f"{run.name} failed; the others go on. See {run.log}", soft_wrap=True)
        elif self._live is None:
            results = run.folder.read_results()
            final = f"  final F1 {results['final_f1']:.3f}" if "final_f1" in results else ""
            count = f"{len(state.finished)}/{len(self.runs)}"
            seconds = f"  {results.get('wall_seconds', 0):.0f} s"
            self.console.print(f"{count:>7}  {run.name:<28}{final}{seconds}", soft_wrap=True)

    def _done(self) -> int:
        return sum(min(step, run.steps) for run, (step, _) in self._progress.items())


def arm_table(runs: Sequence[StudyRun], state: StudyState, progress: RunProgress) -> Table:
    """The progress of a study, one row per arm."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("arm", "done", "waiting", "failed", "final F1, mean"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    table.add_column("running: step and last validation F1")
    for arm, total in Counter(run.arm for run in runs).items():
        groups = (state.finished, state.waiting, state.failed, state.running)
        finished, waiting, failed, running = (_of_arm(group, arm) for group in groups)
        table.add_row(
            arm,
            f"{len(finished)}/{total}",
            str(len(waiting) or ""),
            str(len(failed) or ""),
            _mean_f1([progress[run][1] for run in finished]),
            ", ".join(_running(run, *progress[run]) for run in running),
        )
    return table


def _mean_f1(scores: Iterable[float | None]) -> str:
    known = [score for score in scores if score is not None]
    return f"{fmean(known):.3f}" if known else ""


def _of_arm(runs: Iterable[StudyRun], arm: str) -> list[StudyRun]:
    return [run for run in runs if run.arm == arm]


def _running(run: StudyRun, step: int, f1: float | None) -> str:
    return f"seed{run.seed} {step}/{run.steps}" + ("" if f1 is None else f" F1 {f1:.3f}")
