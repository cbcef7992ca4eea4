"""The verbs fit, validate, test and predict."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from signal import Signals
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from calibadv.config.files import ConfigFile, Option, read_words
from calibadv.config.lightning_cli import CalibadvCLI
from calibadv.config.logging import ended_by_sigterm, quiet_libraries
from calibadv.config.overlays import scan_settings
from calibadv.config.run_setup import (
    FinishedError,
)
from calibadv.errors import RollbackError, UserError
from calibadv.runs.folder import RunFolder
from calibadv.runs.lock import RunLock


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Run fit, validate, test or predict."""
    quiet_libraries()
    settings = read_words(arguments)
    scan_settings(settings)
    try:
        with ended_by_sigterm(), RunLock() as lock:
            cli = run_to_the_end(verb, settings, lock)
            return end(cli) if cli.trainer.is_global_zero else 0
    except FinishedError as finished:
        Console(soft_wrap=True).print(str(finished), highlight=False, markup=False)
        return 0
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}") from error


def end(cli: CalibadvCLI) -> int:
    """Say how a run has ended."""
    done, planned, stopped_by = cli.model.rollout_step, cli.model.rollout_steps, cli.checkpoints.stopped_by
    if cli.verb == "fit" and stopped_by is None and (cli.start.resumed_from or 0) == done < planned:
        raise UserError(
            f"a callback has ended the run before its first rollout step, with {done} of {planned} done: nothing was "
            "trained; leave it out, or let it stop later"
        )
    return goodbye(cli.verb, cli.start.folder, done, planned, stopped_by, cli.resume_command)


def run_to_the_end(verb: str, settings: Sequence[ConfigFile | Option], lock: RunLock) -> CalibadvCLI:
    """Run a verb; where a CollapseGuard goes back to a checkpoint, go on from there as a resume does."""
    while True:
        try:
            return CalibadvCLI(verb, settings, lock)
        except RollbackError as rollback:
            earlier = [s for s in settings if not (isinstance(s, Option) and s.name == "--ckpt_path")]
            settings = [*earlier, *read_words(["--ckpt_path", str(rollback.checkpoint)])]
        gc.collect()  # before another model and engine are loaded
        torch.cuda.empty_cache()


def goodbye(
    verb: str, folder: RunFolder, done: int, planned: int, stopped_by: Signals | None, resume_command: str
) -> int:
    """Say where to look, and how to continue what has ended early."""
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
