"""Run CollapseGuard over the curves of finished runs:  python -m tools.bench.replay_guard RUN...

A RUN is a run folder or a folder that holds such. Each run's curves are given to the guard's rules step by step, with
the default limits; the table says when it would have spoken first, of what, and whether the run counts as collapsed.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from calibadv.analysis.compare.runs import Run, find_runs, read_runs
from calibadv.callbacks._collapse.detector import Alarm, Watch
from calibadv.callbacks._collapse.rules import Limits
from calibadv.runs.summary import summarize_run


def alarms(run: Run) -> list[Alarm]:
    """Give a run's curves to the rules: those of each training step, then those of the validation behind it."""
    watch, found = Watch(Limits()), []
    for step in sorted({step for curve in run.curves.values() for step in curve}):
        for of_validation in (False, True):
            row = {
                tag: curve[step]
                for tag, curve in run.curves.items()
                if step in curve and tag.startswith("val/") == of_validation
            }
            found += watch.observe(row, step) if row else []
    return found


def main(folders: list[str]) -> None:
    """Print the table, and what it comes to."""
    table = Table(box=None)
    for name in ("run", "collapsed", "first alarm", "all alarms"):
        table.add_column(name)
    verdicts: Counter[tuple[bool, bool]] = Counter()
    for run in read_runs(find_runs([Path(folder) for folder in folders]), {}):
        found = alarms(run)
        acts = [alarm for alarm in found if alarm.acts]
        result = summarize_run(run.validations)
        verdicts[bool(result["collapsed"]), bool(acts)] += 1
        when = "" if result["step_of_collapse"] is None else f", step {result['step_of_collapse']}"
        table.add_row(
            run.label,
            f"yes{when}" if result["collapsed"] else "no",
            f"step {acts[0].step}: {acts[0].curve}" if acts else "-",
            ", ".join(f"{curve} {count}" for curve, count in Counter(alarm.curve for alarm in found).items()),
        )
    console = Console(width=160, highlight=False)
    console.print(table)
    for collapsed, word in ((True, "collapsed"), (False, "not collapsed")):
        total = verdicts[collapsed, True] + verdicts[collapsed, False]
        console.print(f"{word}: an alarm that acts in {verdicts[collapsed, True]} of {total} runs")


if __name__ == "__main__":
    main(sys.argv[1:])
