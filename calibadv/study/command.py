"""``calibadv study``: check everything, run the unfinished runs, and write the report."""

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

from calibadv.config.arms import PER_RUN_OPTIONS, REPORT, read_arms
from calibadv.config.files import Option, read_words
from calibadv.config.help import STUDY, set_option_help
from calibadv.config.logging import quiet_libraries
from calibadv.errors import UserError
from calibadv.runs.folder import RunFolder
from calibadv.runs.versions import versions
from calibadv.study.arms import ArmCLI, resolve_arms
from calibadv.study.fingerprints import source_fingerprints
from calibadv.study.manifest import StudyManifest
from calibadv.study.options import LIST_OPTIONS, StudyOptions, read_options, split_options
from calibadv.study.runner import run_all
from calibadv.study.runs import StudyState, study_runs, write_arm_config
from calibadv.study.table import ConsoleView

_LOCK = ".study.lock"


class StudyHelp(ArmCLI):
    """Prints ``study --help``: the options of ``study`` and those of ``fit``."""

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
        own.description = STUDY
        set_option_help(own)
        for action in own._actions:
            if action.dest.partition(".")[0] in PER_RUN_OPTIONS:
                action.help = SUPPRESS
            elif action.dest in LIST_OPTIONS:
                action.option_strings, action.metavar = [f"--{action.dest}"], LIST_OPTIONS[action.dest]
        own.print_help()
        raise SystemExit(0)


def study(arguments: Sequence[str]) -> int:
    """Train several methods over seeds with everything else equal, and report how they compare.

    Every arm and seed is a run in a process and a folder of its own. A call with the folder of an earlier one
    continues it: finished runs are kept, and the others go on from their last checkpoint.
    """
    quiet_libraries()
    options, given = read_study(arguments)
    plan_study(given, options.folder, options.baseline)  # refuses before anything is written
    with _lock_folder(options.folder):
        # A study that has just ended may have extended it.
        manifest = plan_study(given, options.folder, options.baseline)
        manifest.write(options.folder)
        for arm, config in manifest.arms.items():
            write_arm_config(options.folder, arm, config)
        return _run(manifest, _num_jobs(options, manifest), options, shlex.join(["calibadv", "study", *arguments]))


def read_study(arguments: Sequence[str]) -> tuple[StudyOptions, StudyManifest]:
    """Parse and check a command line."""
    own, common = split_options(read_words(arguments))
    for option in common:
        if isinstance(option, Option) and option.name in ("--help", "-h"):
            StudyHelp([])
    options = read_options(own)
    arms = read_arms(options.arm)
    settings = resolve_arms(arms, common)
    return options, StudyManifest(
        settings, options.seeds, options.threads, versions(), source_fingerprints(settings.values())
    )


def _lock_folder(out: Path) -> AbstractContextManager[object]:
    """The lock of a study's folder, which the system frees when the process ends, even if it is killed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return FileLock(out / _LOCK).acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another study is running in {out}; wait for it, or choose another --out") from error
    except OSError as error:
        raise UserError(f"out '{out}' cannot be written to ({error.strerror}); choose another --out") from error


def plan_study(given: StudyManifest, out: Path, baseline: str | None = None) -> StudyManifest:
    """Return the manifest of a study that is begun, continued, or extended by arms and seeds."""
    before = StudyManifest.read(out)
    if before is None and RunFolder(out).config(None).exists():
        raise UserError(f"'{out}' is the folder of a run; choose another --out")
    manifest = given if before is None else before.extended(given, out)
    manifest.check_arms()
    if baseline is not None and baseline not in manifest.arms:
        raise UserError(f"--baseline is '{baseline}'; it must be one of the arms: {', '.join(manifest.arms)}")
    known = set() if before is None else {run.folder.path for run in study_runs(before, out)}
    for run in study_runs(manifest, out):
        if run.folder.path not in known:
            _check_free(run.folder.path)
    return manifest


def _check_free(path: Path) -> None:
    taken = path.parent if path.parent.is_file() else path
    if taken.exists():
        raise UserError(f"{taken} exists and is not part of this study; choose another --out, or move it away")


def _num_jobs(options: StudyOptions, manifest: StudyManifest) -> int:
    if options.jobs is not None:
        return options.jobs
    accelerators = {str(settings["trainer"]["accelerator"]) for settings in manifest.arms.values()}
    if accelerators - {"auto", "cpu"} or ("auto" in accelerators and torch.accelerator.is_available()):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // options.threads)


def _run(manifest: StudyManifest, jobs: int, options: StudyOptions, command: str) -> int:
    runs = list(study_runs(manifest, options.folder))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    view = ConsoleView(runs, console)
    with view.shown():
        state = run_all(runs, jobs, options.threads, view)
    done = f"{len(state.finished)} of {len(runs)} runs are finished"
    if state.stopped_by is not None:
        console.print(f"stopped by {state.stopped_by.name}, {done}; to continue:\n  {command}")
        return 128 + state.stopped_by
    for run, reason in state.failed.items():
        console.print(f"{run.name} failed: {reason}\n  {run.log}")
    console.print(f"{done}; to repeat the others:\n  {command}" if state.failed else done)
    if state.finished:
        _report(list(manifest.arms), state, options, command)
        console.print(f"report      {options.folder / REPORT / 'report.html'}")
    return 1 if state.failed else 0


def _report(arms: Sequence[str], state: StudyState, options: StudyOptions, command: str) -> None:
    """Write the report of the finished runs, as ``compare`` does, with a warning for each failed one."""
    from calibadv.analysis.compare.command import compare_runs, print_results, write_report
    from calibadv.analysis.compare.summary import default_baseline

    finished = sorted(state.finished, key=lambda run: (arms.index(run.arm), run.seed))
    wanted = options.baseline or default_baseline(arms)
    baseline = wanted if any(run.arm == wanted for run in finished) else None
    results, compared = compare_runs([run.folder.path for run in finished], baseline)
    missing = [f"{run.name} failed, and is not in this report" for run in state.failed]
    if baseline is None:
        missing.append(f"no run of {wanted} is finished, so {results['baseline']} is the baseline instead")
    results["warnings"][:0] = missing
    write_report(options.folder / REPORT, results, compared, command)
    print_results(results)
