"""The last lines of a run: where to look, and after a signal how to continue."""

from __future__ import annotations

from signal import Signals

from rich.console import Console

from calibadv.run_folder import RunFolder


def goodbye(verb: str, folder: RunFolder, rollout_step: int, stopped_by: Signals | None, resume_command: str) -> int:
    """Say where to look, and after a signal how to continue.

    Args:
        verb: what was run.
        folder: of the run.
        rollout_step: rollout steps done.
        stopped_by: the signal that ended training early, or None.
        resume_command: what to type to go on.

    Returns:
        The exit status: 0, or 128 + signal.
    """
    lines = _training(folder) if verb == "fit" else []
    lines += [f"results     {folder.results}"] if verb != "predict" else []
    lines += [f"rollouts    {folder.rollouts}"]
    if stopped_by is not None:
        lines += [
            f"stopped by {stopped_by.name} after rollout step {rollout_step}; to continue:",
            f"  {resume_command}",
        ]
    Console(soft_wrap=True).print("\n".join(lines), highlight=False, markup=False)
    return 0 if stopped_by is None else 128 + stopped_by


def _training(folder: RunFolder) -> list[str]:
    lines = []
    rows = [row for row in folder.read_results().get("validations", []) if "f1" in row]
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        lines.append(
            f"validation F1 {first['f1']:.3f} (step {first['step']}) -> {last['f1']:.3f} (step {last['step']})"
        )
    if any(folder.path.glob("events.*")):
        lines.append(f"curves      tensorboard --logdir {folder.path}")
    return [*lines, f"checkpoint  {folder.last}"]
