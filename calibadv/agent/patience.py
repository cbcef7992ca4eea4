"""The calls of one round of rollouts, and waiting for a service that is away."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread

from calibadv.agent.environment import Environment, Outcome
from calibadv.errors import OutageError, RetrievalError, StopRequestedError
from calibadv.types import ToolCall

# Seconds before a service is asked again: at first, how much longer each time, and at most.
_PAUSE, _GROWTH, _LONGEST_PAUSE = 1.0, 1.5, 5.0
# Seconds between two looks at whether to stop, and those that calls may still take once the run is to stop.
_LOOK, _GRACE = 0.2, 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Limits of waiting for a retriever that is away or does not answer."""

    cap: float  # the most seconds of one call of run_rollouts, however patient the retriever is
    stop_requested: Callable[[], bool]  # polled all the time; once true, waiting ends with a StopRequestedError


class PatientEnvironment:
    """An environment that outlasts outages of its tools; without leave to wait, they are failures like any other."""

    def __init__(self, environment: Environment, waiting: Waiting | None) -> None:
        self._environment = environment
        self._waiting = waiting
        self._waited = 0.0
        self._closed = False

    def step(self, messages: Sequence[Sequence[ToolCall]]) -> list[Outcome]:
        """Run the calls of some messages, again and again those whose tool is away."""
        if self._waiting is None:
            return self._environment.step(messages)
        began = time.monotonic()
        outcomes = self._call(messages, self._waiting)
        if _away(outcomes):
            self._outlast(messages, outcomes, self._waiting, began)
        return outcomes

    def close(self) -> None:
        """End a call that waits in another thread."""
        self._closed = True

    def _call(self, messages: Sequence[Sequence[ToolCall]], waiting: Waiting) -> list[Outcome]:
        """Run calls in a thread of their own, which is left behind if they hang when the run is to stop."""
        answer: Future[list[Outcome]] = Future()

        def run() -> None:
            try:
                answer.set_result(self._environment.step(messages))
            except BaseException as error:
                answer.set_exception(error)

        thread = Thread(target=run, name="tools", daemon=True)  # the process does not wait for it at its end
        thread.start()
        began = time.monotonic()
        stop_by = math.inf
        while True:
            thread.join(_LOOK)
            if not thread.is_alive():
                return answer.result()
            seconds = time.monotonic() - began
            if stop_by == math.inf and self._stops(waiting):
                stop_by = seconds + _GRACE
            if seconds >= stop_by:
                raise StopRequestedError(f"asked to stop, and the retriever has not answered for {seconds:.0f} s")
            if seconds >= waiting.cap - self._waited:
                raise RetrievalError(f"the retriever has not answered for {seconds:.0f} s")

    def _outlast(
        self, messages: Sequence[Sequence[ToolCall]], outcomes: list[Outcome], waiting: Waiting, began: float
    ) -> None:
        """Run again, in place, what is away, until it is back; it has been away since ``began``."""
        pause = _PAUSE
        waited_before, told = self._waited, False
        while away := _away(outcomes):
            limit = min(max(error.patience for error in away.values()), waiting.cap)
            reason = next(iter(away.values()))
            self._waited = waited_before + time.monotonic() - began
            if self._waited >= limit:
                raise RetrievalError(
                    f"the retriever was waited for, for {self._waited:.0f} s (limit: {limit:g} s): {reason}"
                ) from reason
            if not told:
                log.warning("the retriever is away, waiting for at most %.0f s: %s", limit - self._waited, reason)
                told = True
            self._pause(min(pause, limit - self._waited), waiting)
            pause = min(pause * _GROWTH, _LONGEST_PAUSE)
            again = self._call([messages[index] for index in away], waiting)
            for index, outcome in zip(away, again, strict=True):
                outcomes[index] = outcome
        self._waited = waited_before + time.monotonic() - began
        log.warning("the retriever is back after %.0f s", time.monotonic() - began)

    def _pause(self, seconds: float, waiting: Waiting) -> None:
        until = time.monotonic() + seconds
        while True:
            if self._stops(waiting):
                raise StopRequestedError("asked to stop, while waiting for the retriever")
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, _LOOK))

    def _stops(self, waiting: Waiting) -> bool:
        return self._closed or waiting.stop_requested()


def _away(outcomes: Sequence[Outcome]) -> dict[int, OutageError]:
    """The outcomes to wait for, by index."""
    return {
        index: outcome
        for index, outcome in enumerate(outcomes)
        if isinstance(outcome, OutageError) and outcome.patience > 0
    }
