"""The multi-turn loop of engines that batch continuously: every rollout goes at its own pace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

from calibadv.agent.completions import check_count, collect
from calibadv.agent.environment import Outcome
from calibadv.agent.episode import Agent, Episode, append_message, append_observations, unfinished
from calibadv.agent.patience import PatientEnvironment
from calibadv.interfaces import StreamingEngine
from calibadv.types import DrawKey, Sampling

Key = Callable[[Episode], DrawKey]


def run_streaming(
    episodes: Sequence[Episode],
    engine: StreamingEngine,
    agent: Agent,
    environment: PatientEnvironment,
    sampling: Sampling,
    key: Key,
) -> None:
    """Run all episodes to their ends. The records are those of the lockstep loop, only sooner.

    While the engine samples, one round of calls at a time runs beside it, for all episodes that have called since the
    last one began. Only tools, and waiting for one that is away, run in the worker thread: tokenizers are not
    thread-safe.
    """
    in_flight: dict[int, Episode] = {}
    pending: list[Episode] = []  # have made calls that are not run yet

    def submit(ready: Sequence[Episode]) -> None:
        going = unfinished(ready)
        numbers = engine.submit([e.token_ids for e in going], sampling, [key(e) for e in going])
        check_count(numbers, engine, [e.question for e in going])
        in_flight.update(zip(numbers, going, strict=True))

    def receive() -> list[Episode]:
        done = collect(engine, {number: episode.question for number, episode in in_flight.items()})
        received = [in_flight.pop(number) for number in done]
        for episode, completion in zip(received, done.values(), strict=True):
            append_message(episode, completion, agent)
        return received

    submit(episodes)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="search") as background, closing(environment):
        acting: list[Episode] = []
        found: Future[list[Outcome]] = Future()
        while in_flight or pending or acting:
            if acting and (found.done() or not in_flight):
                append_observations(acting, found.result(), agent)
                submit(acting)
                acting = []
            if pending and not acting:
                acting, pending = pending, []
                found = background.submit(environment.step, [episode.calls for episode in acting])
            pending += unfinished(receive() if in_flight else [])
