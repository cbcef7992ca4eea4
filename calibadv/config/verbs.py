"""The verbs fit, validate, test and predict: run one, and print its summary."""

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
from calibadv.config.overlays import check_overlay_order
from calibadv.config.run_setup import FinishedError
from calibadv.errors import RollbackError, UserError
from calibadv.runs.folder import RunFolder
from calibadv.runs.lock import RunLock


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Run fit, sft, validate, test or predict, and return the exit status."""
    quiet_libraries()
    settings = read_words(arguments)
    check_overlay_order(settings)
    try:
        with ended_by_sigterm(), RunLock() as lock:
            cli = _run_with_rollbacks(verb, settings, lock)
            return _summarize(cli) if cli.trainer.is_global_zero else 0
    except FinishedError as finished:
        Console(soft_wrap=True).print(str(finished), highlight=False, markup=False)
        return 0
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}") from error


def _run_with_rollbacks(verb: str, settings: Sequence[ConfigFile | Option], lock: RunLock) -> CalibadvCLI:
    """Run a verb; after a rollback of CollapseGuard, resume from its checkpoint."""
    while True:
        try:
            return CalibadvCLI(verb, settings, lock)
        except RollbackError as rollback:
            earlier = [setting for setting in settings if setting.name != "--ckpt_path"]
            settings = [*earlier, *read_words(["--ckpt_path", str(rollback.checkpoint)])]
        gc.collect()  # before another model and engine are loaded
        torch.cuda.empty_cache()


def _summarize(cli: CalibadvCLI) -> int:
    """Print where the results are and how to continue, and return the exit status."""
    done, planned, stopped_by = cli.model.rollout_step, cli.model.rollout_steps, cli.checkpoints.stopped_by
    if cli.verb == "fit" and stopped_by is None and (cli.start.resumed_from or 0) == done < planned:
        raise UserError(
            f"a callback has ended the run before its first rollout step, with {done} of {planned} done: nothing was "
            "trained; leave it out, or let it stop later"
        )
    results = cli.start.folder.read_results() if cli.verb == "fit" else {}
    lines = _file_lines(cli.verb, cli.start.folder, results)
    if stopped_by is not None or (cli.verb == "fit" and done < planned):
        reason = _stop_reason(stopped_by, results)
        lines.append(f"stopped by {reason} after rollout step {done} of {planned}; to continue:")
        lines.append(f"  {cli.resume_command}")
    Console(soft_wrap=True).print("\n".join(lines), highlight=False, markup=False)
    return 0 if stopped_by is None else 128 + stopped_by


def _stop_reason(stopped_by: Signals | None, results: Mapping[str, Any]) -> str:
    if stopped_by is not None:
        return stopped_by.name
    return "its guard" if results.get("stopped_by_guard", False) else "trainer.max_time or a callback"


def _file_lines(verb: str, folder: RunFolder, results: Mapping[str, Any]) -> list[str]:
    lines = _training_lines(folder, results) if verb == "fit" else []
    if verb != "predict":
        lines.append(f"results     {folder.results}")
    return [*lines, f"rollouts    {folder.rollouts}"]


def _training_lines(folder: RunFolder, results: Mapping[str, Any]) -> list[str]:
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
