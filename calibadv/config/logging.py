"""Users see our own lines: start-up notices of libraries are lowered here, one by one, each with its reason."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def quiet_environment() -> None:
    """Set what libraries look at when they are imported."""
    # Lightning's own command line calls what jsonargparse has renamed.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # TensorBoard tells that TensorFlow, which it does not need here, is missing.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def quiet_libraries() -> None:
    """Lower what imported libraries say without being asked. Warnings that a user can act on stay."""
    from transformers.utils import logging as transformers_logging

    # Progress bars of loading weights, and advice on how to load faster.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    # Lightning announces devices, seeds and its paid products, through handlers of its own.
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning 2.6 calls in every fit what torch 2.13 has renamed.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
    # A run without validation questions is a choice.
    warnings.filterwarnings("ignore", message="Total length of `EvaluationQuestions` across ranks is zero")
    # The training questions follow the rollout step, whatever Lightning's epochs are.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    # Which device to take is said in the config; Lightning points out that there are others.
    warnings.filterwarnings("ignore", message="GPU available but not used")
    # Every process holds all rollouts, so what callbacks monitor is equal on all of them.
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
    threading.excepthook = _quiet_threads
    logging.basicConfig(format="calibadv: %(message)s", level=logging.WARNING)


def _quiet_threads(failed: threading.ExceptHookArgs) -> None:
    """Leave out the traceback of the thread that writes curves: what it meets is raised again where they are logged."""
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failed)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """End the process with status 143 on SIGTERM, where Lightning would only take note of it.

    While a run trains, RolloutCheckpoint listens in its place.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
