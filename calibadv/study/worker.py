"""The worker process of one run: ``python -m calibadv.study.worker OUT ARM SEED``, started by a study."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Thread

from filelock import FileLock, Timeout
from rich.console import Console

from calibadv.config.logging import quiet_environment
from calibadv.config.run_setup import STUDY_WORDS
from calibadv.config.threads import sleep_while_waiting
from calibadv.config.user_errors import run_reporting
from calibadv.study.manifest import StudyManifest
from calibadv.study.runs import StudyRun, study_runs


def main(arguments: Sequence[str]) -> int:
    """Start or continue one run, and mark it once it has ended."""
    if STUDY_WORDS in os.environ:  # Lightning starts further processes by this command, with a copy of the environment
        return _train(shlex.split(os.environ[STUDY_WORDS]))
    out, arm, seed = arguments
    manifest = StudyManifest.read(Path(out))
    assert manifest is not None, "the study writes it before it starts workers"
    run = next(run for run in study_runs(manifest, Path(out)) if (run.arm, str(run.seed)) == (arm, seed))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    Thread(target=_stop_with_parent, daemon=True).start()
    with _lock_run(run, console):
        if run.finished:  # by the process that this one has waited for
            return 0
        try:
            manifest.check_unchanged()
        except ValueError as error:
            console.print(f"not started: {error}")
            return 1
        fit_arguments = run.fit_arguments
        os.environ[STUDY_WORDS] = shlex.join(fit_arguments)
        console.print(f"calibadv {os.environ[STUDY_WORDS]}")
        status = _train(fit_arguments)
        if status == 0:
            run.mark_finished()
        return status


def _train(words: Sequence[str]) -> int:
    quiet_environment()
    sleep_while_waiting()
    verb, *arguments = words

    def command() -> int:
        from calibadv.config.verbs import run_verb

        return run_verb(verb, arguments)

    return run_reporting(command)


def _stop_with_parent() -> None:
    """Stop gracefully once the study's process has ended or was killed."""
    while os.read(sys.stdin.fileno(), 1):  # a pipe into which nothing is written; it closes with the study
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _lock_run(run: StudyRun, console: Console) -> AbstractContextManager[object]:
    """Wait for the lock of a run: the worker of a killed study still finishes its step, and saves."""
    lock = FileLock(run.lock)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        console.print("waiting for the process of an earlier call, which is finishing its step")
        return lock.acquire()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
