"""Runs as processes, so many at a time, and an orderly stop of all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from calibadv.study.runs import StudyRun

_POLL_SECONDS = 0.2
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass
class State:
    """How the runs of a study stand; each is in one of the collections. Failed ones have the reason."""

    waiting: list[StudyRun]
    finished: list[StudyRun]
    running: dict[StudyRun, subprocess.Popen[bytes]] = field(default_factory=dict)
    failed: dict[StudyRun, str] = field(default_factory=dict)
    stopped_by: signal.Signals | None = None


class View(Protocol):
    """Shows how a study goes on."""

    def update(self, state: State) -> None:
        """Look at the runs; called several times a second."""

    def stopping(self, state: State, at_once: bool) -> None:
        """Say that the runs have been told to stop, or were ended."""

    def ended(self, run: StudyRun, state: State) -> None:
        """Say that a run has come to its end, or has failed."""


def run_all(runs: Sequence[StudyRun], jobs: int, threads: int, view: View) -> State:
    """Train all runs that are not finished.

    The first Ctrl-C or SIGTERM lets every run finish its step and save; the second one ends them at once.
    """
    state = State([run for run in runs if not run.finished], [run for run in runs if run.finished])
    try:
        with _signals() as received:
            told = 0
            while state.running or (state.waiting and not state.stopped_by):
                if not received:
                    _start(state, jobs, threads)
                elif len(received) > told:
                    told = len(received)
                    state.stopped_by = received[0]
                    _stop(state, at_once=told > 1)
                    view.stopping(state, at_once=told > 1)
                _collect(state, view)
                view.update(state)
                time.sleep(_POLL_SECONDS)
    finally:
        _stop(state, at_once=True)  # nothing is left, unless there is an error of our own
    return state


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Note the signals that ask for an end, in the place of acting on them."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(run: StudyRun, status: int) -> str:
    """Why a run has failed: what it has said at the end, but for the signal that leaves no time to say anything."""
    if status == -signal.SIGKILL:
        return "killed by SIGKILL, as systems do when memory is short"
    return run.last_line() if status >= 0 else f"ended by signal {-status}: {run.last_line()}"


def _start(state: State, jobs: int, threads: int) -> None:
    while state.waiting and len(state.running) < jobs:
        run = state.waiting.pop(0)
        state.running[run] = _process(run, threads)


def _process(run: StudyRun, threads: int) -> subprocess.Popen[bytes]:
    words = [str(run.out), run.arm, str(run.seed)]
    environment = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}
    environment.pop("FORCE_COLOR", None)  # its output goes into a file
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "calibadv.study.worker", *words],
            env=environment,
            stdin=subprocess.PIPE,  # ends with this process, however that ends: the worker then stops too
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal reaches this process only, which passes it on once
        )


def _stop(state: State, at_once: bool) -> None:
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


def _collect(state: State, view: View) -> None:
    """Take note of the processes that have ended."""
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
            state.failed[run] = _reason(run, process.returncode)
        view.ended(run, state)
