"""``calibadv compare``: read run folders, and write the report that compares them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from calibadv.analysis.compare.arms import Arm, group_arms
from calibadv.analysis.compare.charts import figure_png, figure_svg
from calibadv.analysis.compare.curve_docs import known_tags
from calibadv.analysis.compare.curves import read_name_map
from calibadv.analysis.compare.page import draw_charts, render_html, render_markdown
from calibadv.analysis.compare.runs import find_runs, read_runs
from calibadv.analysis.compare.scores import score_run
from calibadv.analysis.compare.sections import curve_sections, make_chart
from calibadv.analysis.compare.summary import Results, choose_baseline, summarize
from calibadv.errors import UserError
from calibadv.io.files import replace_durably
from calibadv.io.progress_bar import tracked
from calibadv.runs.folder import RunFolder
from calibadv.runs.versions import machine

_HEADLINE, _HEADLINE_TITLE = "val/f1", "validation F1"


def compare(runs: list[Path], out: Path, baseline: str | None = None, names: Path | None = None) -> None:
    """Compare trained runs: curves, final results with intervals, and paired tests against a baseline.

    Runs that differ in the seed only form an arm. Written are report.html, report.md, figure.svg and figure.png;
    results.json, which is the same for the same runs; and timing.json, with seconds, commands and the machine.

    Args:
        runs: Run folders, or folders that hold such at any depth, as a study's does.
        out: Folder to write the report into; its files of these names are replaced when all is done.
        baseline: Name of the arm that the others are compared with; by default grpo, or else the first.
        names: Name map for the TensorBoard curves of other programs, YAML: 'our tag: their tag' a line.

    Raises:
        UserError: there is nothing to compare, or a file cannot be used; ``out`` is then left as it was.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"out '{out}' is not a folder; give one, or a name that is free")
    if RunFolder(out).config(None).exists() or RunFolder(out).holds_study:
        raise UserError(f"out '{out}' is the folder of a run or a study, whose files it would mix with; give another")
    results, arms = compare_runs(runs, baseline, names)
    write_report(out, results, arms)
    print_results(results)


def compare_runs(
    runs: Sequence[Path], baseline: str | None = None, names: Path | None = None
) -> tuple[Results, list[Arm]]:
    """Read runs and compute all results of their comparison."""
    if not runs:
        raise UserError("runs names no folder; give run folders, or folders that hold such")
    mapped = {} if names is None else read_name_map(names, known_tags())
    paths = find_runs(runs)
    found = list(tracked(read_runs(paths, mapped), "Reading runs", len(paths)))
    if mapped and all(run.is_calibadv_run for run in found):
        raise UserError(f"name map '{names}' is for runs of other programs, and all of these are ours; leave it out")
    arms = group_arms(found)
    chosen = choose_baseline(arms, baseline)
    finished = [run for arm in arms for run in arm.finished]
    scored = iter(list(tracked(map(score_run, finished), "Scoring questions", len(finished))))
    scores = {arm.name: [next(scored) for _ in arm.finished] for arm in arms}
    return summarize(arms, chosen, scores), arms


def write_report(out: Path, results: Results, arms: Sequence[Arm], command: str | None = None) -> None:
    """Write all files of a report, each whole or not at all."""
    timing = _timing(arms, command)
    sections = curve_sections(arms)
    arm_names = [arm.name for arm in arms]
    total = sum(len(section.charts) for section in sections)
    pictures = dict(tracked(draw_charts(sections, arm_names), "Drawing", total))
    drawn = [(section, [pictures[entry.tag] for entry in section.charts]) for section in sections]
    headline = make_chart(_HEADLINE, arms)
    contents: dict[str, str | bytes] = {
        "report.html": render_html(results, timing, arms, drawn),
        "report.md": render_markdown(results, timing, arms, has_figure=bool(headline.bands)),
        "timing.json": _json(timing),
        "results.json": _json(results),
    }
    if headline.bands:
        contents["figure.svg"] = figure_svg(headline, arm_names, _HEADLINE_TITLE)
        contents["figure.png"] = figure_png(headline, arm_names, _HEADLINE_TITLE)
    _write_together(out, contents)
    if not headline.bands:
        for name in ("figure.svg", "figure.png"):  # of an earlier report
            (out / name).unlink(missing_ok=True)


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _write_together(out: Path, contents: dict[str, str | bytes]) -> None:
    """Write all files into a temporary folder, and move them to their places once all are written."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f".report.{os.getpid()}.partial"
    partial.mkdir()
    try:
        for name, content in contents.items():
            (partial / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        for name in contents:
            replace_durably(partial / name, out / name)
    finally:
        shutil.rmtree(partial)


def _timing(arms: Sequence[Arm], command: str | None) -> dict[str, Any]:
    """The content of timing.json: everything that depends on when and where runs and report were made."""
    rows = {
        run.label: {
            "arm": arm.name,
            "wall_seconds": run.results.get("wall_seconds"),
            "command": run.results.get("command"),
        }
        for arm in arms
        for run in arm.runs
    }
    means = {}
    for arm in arms:
        seconds = [run.results["wall_seconds"] for run in arm.finished if "wall_seconds" in run.results]
        means[arm.name] = round(sum(seconds) / len(seconds), 1) if seconds else None
    written = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"written": written, "command": command, "compared_on": machine(), "mean_wall_seconds": means, "runs": rows}


def print_results(results: Results) -> None:
    """Print the warnings and verdicts of a report."""
    console = Console(soft_wrap=True)
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
    for row in results["arms"]:
        if "difference" in row:
            console.print(row["difference"]["verdict"], highlight=False, markup=False)
