"""The last lines of a run: where to look, and after a stop how to continue."""

from __future__ import annotations

from collections.abc import Mapping
from signal import Signals
from typing import Any

from rich.console import Console

from calibadv.run_folder import RunFolder


def goodbye(
    verb: str, folder: RunFolder, done: int, planned: int, stopped_by: Signals | None, resume_command: str
) -> int:
    """Say where to look, and how to continue what has ended early.

    Args:
        verb: what was run.
        folder: of the run.
        done: rollout steps done.
        planned: rollout steps asked for.
        stopped_by: the signal that ended training early, or None.
        resume_command: what to type to go on.

    Returns:
        The exit status: 0, or 128 + signal.
    """
    results = folder.read_results() if verb == "fit" else {}
    lines = _training(folder, results) if verb == "fit" else []
    lines += [f"results     {folder.results}"] if verb != "predict" else []
    lines += [f"rollouts    {folder.rollouts}"]
    if stopped_by is not None or (verb == "fit" and done < planned):
        stopper = _stopper(stopped_by, results)
        lines += [f"stopped by {stopper} after rollout step {done} of {planned}; to continue:", f"  {resume_command}"]
    Console(soft_wrap=True).print("\n".join(lines), highlight=False, markup=False)
    return 0 if stopped_by is None else 128 + stopped_by


def _stopper(stopped_by: Signals | None, results: Mapping[str, Any]) -> str:
    if stopped_by is not None:
        return stopped_by.name
    return "its guard" if results.get("stopped_by_guard", False) else "trainer.max_time or a callback"


def _training(folder: RunFolder, results: Mapping[str, Any]) -> list[str]:
    lines = []
    rows = [row for row in results.get("validations", []) if "f1" in row]
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        lines.append(
            f"validation F1 {first['f1']:.3f} (step {first['step']}) -> {last['f1']:.3f} (step {last['step']})"
        )
    if any(folder.path.glob("events.*")):
        lines.append(f"curves      tensorboard --logdir {folder.path}")
    return [*lines, f"checkpoint  {folder.last}"]
