"""What a user sees while a study goes on: a table that is renewed, or one line per run where there is no terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from calibadv.study.runner import State
from calibadv.study.runs import StudyRun

_LOOK_SECONDS = 2.0
# Time left is estimated from all of this call: runs come and go, and most of their steps are seen in tens.
_SPEED_PERIOD = 30 * 24 * 3600.0

Progresses = dict[StudyRun, tuple[int, float | None]]


class Tables:
    """Shows a study on a console.

    Args:
        runs: all of the study.
        console: to print on.
    """

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
        self._progress: Progresses = {run: run.progress() for run in runs}
        self._looked = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table, where there is a terminal, for as long as it is held."""
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

    def update(self, state: State) -> None:
        """Renew the table."""
        if self._live is None or time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        self._progress |= {run: run.progress() for run in state.running}
        self._bar.update(self._task, completed=self._done())
        self._live.update(Group(arm_table(self.runs, state, self._progress), self._bar), refresh=True)

    def stopping(self, state: State, at_once: bool) -> None:
        """Say what a signal has led to, while there are runs to wait for."""
        if state.running and state.stopped_by is not None:
            orderly = "each run finishes its step, then saves; once more to stop at once"
            text = f"{state.stopped_by.name}: {'stopped at once' if at_once else orderly}"
            self.console.print(text, soft_wrap=True)

    def ended(self, run: StudyRun, state: State) -> None:
        """Print a line for a run that has ended; a table tells as much by itself."""
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


def arm_table(runs: Sequence[StudyRun], state: State, progress: Progresses) -> Table:
    """Lay out how far a study is."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("arm", "done", "waiting", "failed", "final F1, mean"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    table.add_column("running: step and last validation F1")
    counts = {
        name: Counter(run.arm for run in members)
        for name, members in (("waiting", state.waiting), ("failed", state.failed), ("all", runs))
    }
    for arm in counts["all"]:
        done = [run for run in state.finished if run.arm == arm]
        scores = [f1 for f1 in (progress[run][1] for run in done) if f1 is not None]
        table.add_row(
            arm,
            f"{len(done)}/{counts['all'][arm]}",
            str(counts["waiting"][arm] or ""),
            str(counts["failed"][arm] or ""),
            f"{fmean(scores):.3f}" if scores else "",
            ", ".join(_running(run, *progress[run]) for run in state.running if run.arm == arm),
        )
    return table


def _running(run: StudyRun, step: int, f1: float | None) -> str:
    return f"seed{run.seed} {step}/{run.steps}" + ("" if f1 is None else f" F1 {f1:.3f}")
