"""Runs of a study as worker processes: a limited number at a time, stopped gracefully on a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from calibadv.study.runs import StudyRun, StudyState
from calibadv.study.table import ConsoleView

_POLL_SECONDS = 0.2
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def run_all(runs: Sequence[StudyRun], jobs: int, threads: int, view: ConsoleView) -> StudyState:
    """Train all runs that are not finished.

    The first Ctrl-C or SIGTERM lets every run finish its step and save; the second one ends them at once.
    """
    state = StudyState([run for run in runs if not run.finished], [run for run in runs if run.finished])
    try:
        with _record_signals() as received:
            num_signals = 0
            while state.running or (state.waiting and not state.stopped_by):
                if not received:
                    _start_waiting(state, jobs, threads)
                elif len(received) > num_signals:
                    num_signals = len(received)
                    state.stopped_by = received[0]
                    _stop(state, at_once=num_signals > 1)
                    view.stopping(state, at_once=num_signals > 1)
                _collect_ended(state, view)
                view.update(state)
                time.sleep(_POLL_SECONDS)
    finally:
        _stop(state, at_once=True)  # running processes are left only by an error in the loop
    return state


@contextmanager
def _record_signals() -> Iterator[list[signal.Signals]]:
    received: list[signal.Signals] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failure_reason(run: StudyRun, status: int) -> str:
    """The last line of its output, unless SIGKILL left it no time to print any."""
    if status == -signal.SIGKILL:
        return "killed by SIGKILL, as the system does when it is out of memory"
    return run.last_line() if status >= 0 else f"ended by signal {-status}: {run.last_line()}"


def _start_waiting(state: StudyState, jobs: int, threads: int) -> None:
    while state.waiting and len(state.running) < jobs:
        run = state.waiting.pop(0)
        state.running[run] = _start_worker(run, threads)


def _start_worker(run: StudyRun, threads: int) -> subprocess.Popen[bytes]:
    arguments = [str(run.out), run.arm, str(run.seed)]
    environment = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}
    environment.pop("FORCE_COLOR", None)  # its output goes into a file
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "calibadv.study.worker", *arguments],
            env=environment,
            stdin=subprocess.PIPE,  # ends with this process, however that ends: the worker then stops too
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal reaches this process only, which passes it on once
        )


def _stop(state: StudyState, at_once: bool) -> None:
    for process in state.running.values():
        if process.poll() is not None:
            continue
        if at_once:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.terminate()
    if at_once:
        for process in state.running.values():
            process.wait()


def _collect_ended(state: StudyState, view: ConsoleView) -> None:
    for run, process in list(state.running.items()):
        if process.poll() is None:
            continue
        del state.running[run]
        assert process.stdin is not None
        process.stdin.close()
        if run.finished:
            state.finished.append(run)
        elif state.stopped_by:
            state.waiting.insert(0, run)
            continue
        else:
            state.failed[run] = _failure_reason(run, process.returncode)
        view.ended(run, state)
