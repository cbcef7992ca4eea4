"""The multi-turn loop: the policy writes, the environment searches, until every rollout has ended."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from calibadv.agent.protocol import Message, Protocol, is_valid, parse_message, render_observation
from calibadv.agent.tokenizer import AgentTokenizer
from calibadv.interfaces import Engine, RetrievalError, Retriever
from calibadv.types import (
    Completion,
    Document,
    DrawKey,
    Question,
    Rollout,
    RolloutStatus,
    Sampling,
    Segment,
    StopReason,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Agent:
    """What takes part in an episode."""

    engine: Engine
    retriever: Retriever
    protocol: Protocol
    tokenizer: AgentTokenizer


@dataclass(frozen=True, slots=True)
class Draws:
    """How many rollouts to sample of each question, and what their randomness depends on."""

    seed: int
    step: int
    samples: int
    temperature: float


@dataclass(slots=True)
class _Episode:
    """A rollout in the making; ``token_ids`` is everything so far, the next prompt of the engine."""

    question: Question
    sample: int
    prompt_ids: tuple[int, ...]
    token_ids: list[int]
    segments: list[Segment] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    status: RolloutStatus | None = None


def run_rollouts(questions: Sequence[Question], agent: Agent, draws: Draws) -> list[Rollout]:
    """Sample rollouts, all in step: one call of the engine and one of the retriever per turn.

    Token ids are kept as they were sampled and shown; text is decoded from them to be read, and never encoded again.

    Args:
        questions: what to ask.
        agent: engine, retriever, protocol and tokenizer.
        draws: samples per question, temperature, seed and rollout step.

    Returns:
        ``draws.samples`` rollouts per question, neighbours in the list.

    Raises:
        ValueError: a prompt leaves no room for a message within ``max_rollout_tokens``.
    """
    episodes: list[_Episode] = []
    sampled: Counter[str] = Counter()
    for question in questions:
        prompt = check_prompt(question, agent)
        for _ in range(draws.samples):
            # A question that the batch holds twice goes on counting: equal keys would draw equal rollouts.
            episodes.append(_Episode(question, sampled[question.id], prompt, list(prompt)))
            sampled[question.id] += 1
    sampling = Sampling(draws.temperature, agent.protocol.max_turn_tokens)
    active = episodes
    for turn in range(agent.protocol.max_searches + 1):
        keys = [DrawKey(draws.seed, draws.step, e.question.id, e.sample, turn) for e in active]
        completions = agent.engine.generate([episode.token_ids for episode in active], sampling, keys)
        for episode, completion in zip(active, completions, strict=True):
            _speak(episode, completion, agent, last_turn=turn == agent.protocol.max_searches)
        active = [episode for episode in active if episode.status is None]
        _search(active, agent)
        active = [episode for episode in active if episode.status is None]
        if not active:
            break
    return [_finish(episode, draws.step, agent.protocol.prepend_think) for episode in episodes]


def check_prompt(question: Question, agent: Agent) -> tuple[int, ...]:
    """Encode the prompt of a question, and see that it leaves room.

    Args:
        question: what to ask.
        agent: its protocol and tokenizer are used.

    Returns:
        Token ids of the prompt.

    Raises:
        ValueError: the prompt alone fills ``max_rollout_tokens``.
    """
    prompt = tuple(agent.tokenizer.encode_prompt(question.question, agent.protocol))
    limit = agent.protocol.max_rollout_tokens
    if len(prompt) >= limit:
        raise ValueError(
            f"the prompt of question '{question.id}' has {len(prompt)} tokens and protocol.max_rollout_tokens is "
            f"{limit}; raise the limit, or leave the question out"
        )
    return prompt


def _speak(episode: _Episode, completion: Completion, agent: Agent, last_turn: bool) -> None:
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
    elif last_turn:
        episode.status = RolloutStatus.OUT_OF_TURNS


def _search(episodes: list[_Episode], agent: Agent) -> None:
    if not episodes:
        return
    try:
        results = agent.retriever.search([e.messages[-1].content for e in episodes], agent.retriever.top_k)
    except RetrievalError as error:
        log.warning("search failed for %d rollouts, which are left out: %s", len(episodes), error)
        for episode in episodes:
            episode.status = RolloutStatus.SEARCH_FAILED
        return
    for episode, found in zip(episodes, results, strict=True):
        _observe(episode, tuple(scored.document for scored in found), agent)


def _observe(episode: _Episode, documents: tuple[Document, ...], agent: Agent) -> None:
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


def _finish(episode: _Episode, step: int, prepend_think: bool) -> Rollout:
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
