"""The multi-turn loop of engines that batch continuously: every rollout goes at its own pace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from calibadv.agent.completions import check_count, collect
from calibadv.agent.episode import Episode, observe, query, speak
from calibadv.agent.searching import Searcher
from calibadv.interfaces import StreamingEngine
from calibadv.retrieval.outcomes import SearchOutcome
from calibadv.types import DrawKey, Sampling

if TYPE_CHECKING:
    from calibadv.agent.episode import Agent

Key = Callable[[Episode], DrawKey]


def stream(
    episodes: Sequence[Episode],
    engine: StreamingEngine,
    agent: Agent,
    searcher: Searcher,
    sampling: Sampling,
    key: Key,
) -> None:
    """Play all episodes to their ends. The records are those of the loop that goes turn by turn, only sooner.

    While the engine samples, one search at a time runs beside it, for all episodes that have asked since the last one
    began. Nothing but the search, and waiting for a retriever that is away, leaves this thread: tokenizers do not bear
    being used by two.
    """
    writing: dict[int, Episode] = {}
    asking: list[Episode] = []  # have written a search that has not begun

    def write(ready: Sequence[Episode]) -> None:
        going = [episode for episode in ready if episode.status is None]
        numbers = engine.submit([e.token_ids for e in going], sampling, [key(e) for e in going])
        check_count(numbers, engine, [e.question for e in going])
        writing.update(zip(numbers, going, strict=True))

    write(episodes)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="search") as background, closing(searcher):
        searching: list[Episode] = []
        found: Future[list[SearchOutcome]] = Future()
        while writing or asking or searching:
            if searching and (found.done() or not writing):
                observe(searching, found.result(), agent)
                write(searching)
                searching = []
            if asking and not searching:
                searching, asking = asking, []
                found = background.submit(searcher.search, [query(episode) for episode in searching])
            for number, completion in (
                collect(engine, {n: e.question for n, e in writing.items()}).items() if writing else ()
            ):
                episode = writing.pop(number)
                speak(episode, completion, agent)
                if episode.status is None:
                    asking.append(episode)
