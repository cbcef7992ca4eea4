"""State of an unfinished rollout, and its transitions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from calibadv.agent.completions import fault_of
from calibadv.agent.environment import Environment, Outcome
from calibadv.errors import ToolError, UserError
from calibadv.interfaces import Engine, Protocol
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.types import (
    Completion,
    Message,
    Question,
    Rollout,
    RolloutStatus,
    Segment,
    StopReason,
    ToolCall,
    ToolResult,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Agent:
    """Everything that takes part in an episode."""

    engine: Engine
    environment: Environment
    protocol: Protocol
    tokenizer: AgentTokenizer


@dataclass(slots=True, eq=False)
class Episode:
    """A rollout that is being sampled; ``token_ids`` is everything so far, the next prompt of the engine."""

    question: Question
    sample: int
    prompt: str
    prompt_ids: tuple[int, ...]
    token_ids: list[int]
    segments: list[Segment] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    status: RolloutStatus | None = None

    @property
    def calls(self) -> Sequence[ToolCall]:
        """The calls of the last message, which the environment runs next."""
        return self.messages[-1].calls


def new_episode(question: Question, sample: int, prompt_ids: tuple[int, ...], agent: Agent) -> Episode:
    """Start an episode with an encoded prompt."""
    prompt = str(agent.tokenizer.backend.decode(list(prompt_ids)))  # special tokens shown, as the model reads them
    return Episode(question, sample, prompt, prompt_ids, list(prompt_ids))


def unfinished(episodes: Sequence[Episode]) -> list[Episode]:
    """Return the episodes that go on."""
    return [episode for episode in episodes if episode.status is None]


def append_message(episode: Episode, completion: Completion, agent: Agent) -> None:
    """Append a message to an episode, in place; the episode ends unless the message calls a tool."""
    fault = fault_of(completion, agent.tokenizer, agent.protocol.max_turn_tokens)
    if fault:
        place = f"question '{episode.question.id}', sample {episode.sample}, message {len(episode.messages) + 1}"
        raise UserError(f"{type(agent.engine).__name__} gave {fault} ({place})")
    room = agent.protocol.max_rollout_tokens - len(episode.token_ids)
    token_ids, logprobs = completion.token_ids[:room], completion.logprobs[:room]
    cut = len(token_ids) < len(completion.token_ids) or completion.stop_reason is StopReason.LENGTH
    text = agent.tokenizer.decode_message(token_ids)
    message = agent.protocol.parse(text)
    episode.segments.append(Segment("policy", text, len(token_ids), token_ids, logprobs))
    episode.messages.append(message)
    episode.token_ids.extend(token_ids)
    if message.answer is not None:
        episode.status = RolloutStatus.ANSWERED
    elif not message.calls:
        episode.status = RolloutStatus.TRUNCATED if cut else RolloutStatus.INVALID
    elif len(episode.messages) > agent.protocol.max_searches:
        episode.status = RolloutStatus.OUT_OF_TURNS


def append_observations(episodes: Sequence[Episode], outcomes: Sequence[Outcome], agent: Agent) -> None:
    """Append the results of each episode's calls, in place; a failed call ends its episode, and no other."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, ToolError)]
    if errors:
        log.warning("%d of %d searches failed, their rollouts are left out: %s", len(errors), len(outcomes), errors[0])
    for episode, outcome in zip(episodes, outcomes, strict=True):
        if isinstance(outcome, ToolError):
            episode.status = RolloutStatus.SEARCH_FAILED
        else:
            _append_observation(episode, outcome, agent)


def _append_observation(episode: Episode, results: Sequence[ToolResult], agent: Agent) -> None:
    limit = agent.protocol.max_document_tokens
    if limit is not None:
        results = [cut_documents(result, limit, agent.tokenizer.cut) for result in results]
    text = agent.protocol.render(results, agent.tokenizer.special_strings)
    token_ids = tuple(agent.tokenizer.encode(text))
    total = len(episode.token_ids) + len(token_ids)
    if total > agent.protocol.max_rollout_tokens:
        episode.status = RolloutStatus.TRUNCATED
        return
    found = [result.documents for result in results if result.documents is not None]
    documents = tuple(document for documents in found for document in documents) if found else None
    episode.segments.append(Segment("environment", text, len(token_ids), token_ids, documents=documents))
    episode.token_ids.extend(token_ids)
    if total == agent.protocol.max_rollout_tokens:  # no room for another message
        episode.status = RolloutStatus.TRUNCATED


def cut_documents(result: ToolResult, max_tokens: int, cut: Callable[[str, int], str]) -> ToolResult:
    """Shorten the texts of a result's documents, as an observation shows them."""
    if result.documents is None:
        return result
    return replace(result, documents=tuple(replace(d, text=cut(d.text, max_tokens)) for d in result.documents))


def to_rollout(episode: Episode, step: int, protocol: Protocol) -> Rollout:
    """Return the record of an episode that has ended."""
    status = episode.status
    assert status is not None, "the loop ends every episode"
    badly_formatted = not all(message.well_formed for message in episode.messages)
    answered_badly = status is RolloutStatus.ANSWERED and not protocol.is_valid(episode.messages)
    if answered_badly or (status is RolloutStatus.OUT_OF_TURNS and badly_formatted):
        status = RolloutStatus.INVALID
    return Rollout(
        question=episode.question,
        sample=episode.sample,
        step=step,
        prepend_think=protocol.opening != "",
        segments=tuple(episode.segments),
        status=status,
        messages=tuple(episode.messages),
        prompt=episode.prompt,
        prompt_ids=episode.prompt_ids,
    )
