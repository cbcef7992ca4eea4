"""One rollout in the making: what a message and an observation change."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calibadv.agent.completions import fault_of
from calibadv.errors import UserError
from calibadv.interfaces import Engine, RetrievalError, Retriever
from calibadv.protocol.search import Message, Protocol, is_valid, parse_message, render_observation
from calibadv.protocol.tokenizer import AgentTokenizer
from calibadv.retrieval.outcomes import SearchOutcome
from calibadv.types import (
    Completion,
    Document,
    Question,
    Rollout,
    RolloutStatus,
    Segment,
    StopReason,
)

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Episode:
    """A rollout in the making; ``token_ids`` is everything so far, the next prompt of the engine."""

    question: Question
    sample: int
    prompt_ids: tuple[int, ...]
    token_ids: list[int]
    segments: list[Segment] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    status: RolloutStatus | None = None


def speak(episode: Episode, completion: Completion, agent: Agent) -> None:
    """Append a message; the episode is over unless it searches."""
    fault = fault_of(completion, agent.tokenizer, agent.protocol.max_turn_tokens)
    if fault:
        place = f"question '{episode.question.id}', sample {episode.sample}, message {len(episode.messages) + 1}"
        raise UserError(f"{type(agent.engine).__name__} gave {fault} ({place})")
    room = agent.protocol.max_rollout_tokens - len(episode.token_ids)
    token_ids, logprobs = completion.token_ids[:room], completion.logprobs[:room]
    cut = len(token_ids) < len(completion.token_ids) or completion.stop_reason is StopReason.LENGTH
    text = agent.tokenizer.decode(token_ids)
    message = parse_message(text, agent.protocol.prepend_think)
    episode.segments.append(Segment("policy", text, len(token_ids), token_ids, logprobs))
    episode.messages.append(message)
    episode.token_ids.extend(token_ids)
    if message.action is None:
        episode.status = RolloutStatus.TRUNCATED if cut else RolloutStatus.INVALID
    elif message.action == "answer":
        episode.status = RolloutStatus.ANSWERED
    elif not message.content:
        episode.status = RolloutStatus.INVALID
    elif len(episode.messages) > agent.protocol.max_searches:
        episode.status = RolloutStatus.OUT_OF_TURNS


def query(episode: Episode) -> str:
    """What an episode searches for."""
    return episode.messages[-1].content


def observe(episodes: Sequence[Episode], outcomes: Sequence[SearchOutcome], agent: Agent) -> None:
    """Append what each episode's search found; a failed one ends its episode, and no other."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, RetrievalError)]
    if errors:
        log.warning("%d of %d searches failed, their rollouts are left out: %s", len(errors), len(outcomes), errors[0])
    for episode, outcome in zip(episodes, outcomes, strict=True):
        if isinstance(outcome, RetrievalError):
            episode.status = RolloutStatus.SEARCH_FAILED
        else:
            _show(episode, tuple(scored.document for scored in outcome), agent)


def _show(episode: Episode, documents: tuple[Document, ...], agent: Agent) -> None:
    text = render_observation(documents, agent.protocol.prepend_think, agent.tokenizer.special_strings)
    token_ids = tuple(agent.tokenizer.encode(text))
    total = len(episode.token_ids) + len(token_ids)
    if total > agent.protocol.max_rollout_tokens:
        episode.status = RolloutStatus.TRUNCATED
        return
    episode.segments.append(Segment("environment", text, len(token_ids), token_ids, documents=documents))
    episode.token_ids.extend(token_ids)
    if total == agent.protocol.max_rollout_tokens:  # no room for another message
        episode.status = RolloutStatus.TRUNCATED


def finish(episode: Episode, step: int, prepend_think: bool) -> Rollout:
    """Make the record of an episode that is over."""
    status = episode.status
    assert status is not None, "the loop ends every episode"
    badly_formatted = not all(message.well_formed for message in episode.messages)
    answered_badly = status is RolloutStatus.ANSWERED and not is_valid(episode.messages)
    if answered_badly or (status is RolloutStatus.OUT_OF_TURNS and badly_formatted):
        status = RolloutStatus.INVALID
    return Rollout(
        question=episode.question,
        sample=episode.sample,
        step=step,
        prepend_think=prepend_think,
        segments=tuple(episode.segments),
        status=status,
        prompt_ids=episode.prompt_ids,
    )


@dataclass(frozen=True, slots=True)
class Agent:
    """What takes part in an episode."""

    engine: Engine
    retriever: Retriever
    protocol: Protocol
    tokenizer: AgentTokenizer
