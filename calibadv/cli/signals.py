"""SIGTERM where no training is in progress: the process ends at once, and cleans up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """End the process with status 143 on SIGTERM, where Lightning would only take note of it.

    While a run trains, RolloutCheckpoint listens in its place.

    Yields:
        Nothing.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
