"""``calibadv study``: check everything, run what is left to run, and write the report."""

from __future__ import annotations

import os
import shlex
from argparse import SUPPRESS
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from typing_extensions import override

from calibadv.config.files import Option, read_words
from calibadv.config.help import describe
from calibadv.config.logging import quiet_libraries
from calibadv.errors import UserError
from calibadv.runs.folder import RunFolder
from calibadv.runs.versions import versions
from calibadv.study.arms import REPORT, ArmCLI, read_arms, resolve_arms
from calibadv.study.fingerprints import digests
from calibadv.study.manifest import Record
from calibadv.study.options import LISTS, PER_RUN, StudyOptions, read_options, split
from calibadv.study.runner import State, run_all
from calibadv.study.runs import runs_of, write_config
from calibadv.study.table import Tables

_LOCK = ".study.lock"
_DESCRIPTION = "Train several methods over seeds with everything else equal, and report how they compare."


class StudyHelp(ArmCLI):
    """The options of ``study``, those of ``fit`` included, for ``--help``."""

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(StudyOptions)
        super().add_default_arguments_to_parser(parser)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        own = self._parser(self.verb)
        own.usage = (
            "calibadv study --out DIR --arm NAME[=OVERLAY+...] ... --seeds N ... [--config NAME_OR_FILE ...] ..."
        )
        own.description = _DESCRIPTION
        describe(own)
        for action in own._actions:
            if action.dest.partition(".")[0] in PER_RUN:
                action.help = SUPPRESS
            elif action.dest in LISTS:
                action.option_strings, action.metavar = [f"--{action.dest}"], LISTS[action.dest]
        own.print_help()
        raise SystemExit(0)


def study(arguments: Sequence[str]) -> int:
    """Train several methods over seeds with everything else equal, and report how they compare.

    Every arm and seed is a run in a process and a folder of its own. A call with the folder of an earlier one
    continues it: finished runs are kept, and the others go on from their last checkpoint.
    """
    quiet_libraries()
    options, given = read_study(arguments)
    plan(given, options.folder, options.baseline)  # refuses before anything is written
    with _alone(options.folder):
        record = plan(given, options.folder, options.baseline)  # a study that has just ended may have extended it
        record.write(options.folder)
        for arm, config in record.arms.items():
            write_config(options.folder, arm, config)
        return _run(record, _jobs(options, record), options, shlex.join(["calibadv", "study", *arguments]))


def read_study(arguments: Sequence[str]) -> tuple[StudyOptions, Record]:
    """Read a command line, and check all of it."""
    own, common = split(read_words(arguments))
    for option in common:
        if isinstance(option, Option) and option.name in ("--help", "-h"):
            StudyHelp([])
    options = read_options(own)
    arms = read_arms(options.arm)
    settings = resolve_arms(arms, common)
    return options, Record(settings, options.seeds, options.threads, versions(), digests(settings.values()))


def _alone(out: Path) -> AbstractContextManager[object]:
    """The lock of a study's folder, which the system frees when its process ends in whatever way."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return FileLock(out / _LOCK).acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another study is at work in {out}; wait for it, or choose another --out") from error
    except OSError as error:
        raise UserError(f"out '{out}' cannot be written to ({error.strerror}); choose another --out") from error


def plan(given: Record, out: Path, baseline: str | None = None) -> Record:
    """Begin a study, continue it, or add arms and seeds to it."""
    before = Record.read(out)
    if before is None and RunFolder(out).config(None).exists():
        raise UserError(f"'{out}' is the folder of a run; choose another --out")
    record = given if before is None else before.extended(given, out)
    record.check_arms()
    if baseline is not None and baseline not in record.arms:
        raise UserError(f"--baseline is '{baseline}'; it must be one of the arms: {', '.join(record.arms)}")
    known = set() if before is None else {run.folder.path for run in runs_of(before, out)}
    for run in runs_of(record, out):
        path = run.folder.path
        there = path.parent if path.parent.is_file() else path
        if path not in known and there.exists():
            raise UserError(f"{there} is there, and not of this study; choose another --out, or move it away")
    return record


def _jobs(options: StudyOptions, record: Record) -> int:
    if options.jobs is not None:
        return options.jobs
    accelerators = {str(settings["trainer"]["accelerator"]) for settings in record.arms.values()}
    if accelerators - {"auto", "cpu"} or ("auto" in accelerators and torch.accelerator.is_available()):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // options.threads)


def _run(record: Record, jobs: int, options: StudyOptions, command: str) -> int:
    runs = list(runs_of(record, options.folder))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    tables = Tables(runs, console)
    with tables.shown():
        state = run_all(runs, jobs, options.threads, tables)
    done = f"{len(state.finished)} of {len(runs)} runs are finished"
    if state.stopped_by is not None:
        console.print(f"stopped by {state.stopped_by.name}, {done}; to continue:\n  {command}")
        return 128 + state.stopped_by
    for run, reason in state.failed.items():
        console.print(f"{run.name} failed: {reason}\n  {run.log}")
    console.print(f"{done}; to try the others again:\n  {command}" if state.failed else done)
    if state.finished:
        _report(list(record.arms), state, options, command)
        console.print(f"report      {options.folder / REPORT / 'report.html'}")
    return 1 if state.failed else 0


def _report(arms: Sequence[str], state: State, options: StudyOptions, command: str) -> None:
    """Write the report of what is finished, as ``compare`` does. It begins with what is not."""
    from calibadv.analysis.compare.command import compare_runs, print_figures, write_report
    from calibadv.analysis.compare.summary import default_baseline

    finished = sorted(state.finished, key=lambda run: (arms.index(run.arm), run.seed))
    wanted = options.baseline or default_baseline(arms)
    baseline = wanted if any(run.arm == wanted for run in finished) else None
    figures, compared = compare_runs([run.folder.path for run in finished], baseline)
    missing = [f"{run.name} failed, and is not in this report" for run in state.failed]
    if baseline is None:
        missing.append(f"no run of {wanted} is finished, so {figures['baseline']} stands in as the baseline")
    figures["warnings"][:0] = missing
    write_report(options.folder / REPORT, figures, compared, command)
    print_figures(figures)
