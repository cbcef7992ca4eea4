"""The multi-turn loop: the policy writes, the environment searches, until every rollout has ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from calibadv.agent.completions import check_count
from calibadv.agent.episode import Agent, Episode, finish, observe, query, speak
from calibadv.agent.searching import Searcher, Waiting
from calibadv.agent.streaming import Key, stream
from calibadv.distributed import SINGLE_PROCESS, ProcessGroup
from calibadv.errors import UserError
from calibadv.interfaces import StreamingEngine
from calibadv.protocol.search import parse_message
from calibadv.types import DrawKey, Question, Rollout, RolloutStatus, Sampling


@dataclass(frozen=True, slots=True)
class Draws:
    """How many rollouts to sample of each question, and what their randomness depends on."""

    seed: int
    step: int
    samples: int
    temperature: float


def run_rollouts(
    questions: Sequence[Question],
    agent: Agent,
    draws: Draws,
    processes: ProcessGroup = SINGLE_PROCESS,
    waiting: Waiting | None = None,
) -> list[Rollout]:
    """Sample rollouts: all in step, or each at its own pace where the engine batches continuously.

    Token ids are kept as they were sampled and shown; text is decoded from them to be read, and never encoded again.

    Args:
        questions: what to ask.
        agent: engine, retriever, protocol and tokenizer.
        draws: samples per question, temperature, seed and rollout step.
        processes: those that share the questions; this one samples for those that it owns.
        waiting: how long a retriever that is away may be waited for; by default not at all.

    Returns:
        ``draws.samples`` rollouts per question of this process, neighbours in the list.

    Raises:
        UserError: a prompt leaves no room for a message within ``max_rollout_tokens``, the engine is made for less or
            answers wrongly, or the retriever answers with what are no documents.
        RetrievalError: the retriever was away for longer than it may be waited for.
        StopRequestedError: the run is to stop, and the retriever is away.
    """
    check_engine(agent)
    episodes: list[Episode] = []
    sampled: Counter[str] = Counter()
    owners = processes.assign_ranks([question.id for question in questions])
    for question, owner in zip(questions, owners, strict=True):
        # A question that the batch holds twice goes on counting: equal keys would draw equal rollouts.
        first = sampled[question.id]
        sampled[question.id] += draws.samples
        if owner == processes.rank:
            prompt = check_prompt(question, agent)
            episodes += [Episode(question, first + n, prompt, list(prompt)) for n in range(draws.samples)]
    sampling = Sampling(draws.temperature, agent.protocol.max_turn_tokens)

    def key(episode: Episode) -> DrawKey:
        return DrawKey(draws.seed, draws.step, episode.question.id, episode.sample, turn=len(episode.messages))

    searcher = Searcher(agent.retriever, waiting)
    try:
        if isinstance(agent.engine, StreamingEngine):
            stream(episodes, agent.engine, agent, searcher, sampling, key)
        else:
            _march(episodes, agent, searcher, sampling, key)
    finally:
        agent.engine.rest()
    return [finish(episode, draws.step, agent.protocol.prepend_think) for episode in episodes]


def _march(episodes: Sequence[Episode], agent: Agent, searcher: Searcher, sampling: Sampling, key: Key) -> None:
    """Play all episodes in step: one call of the engine and one of the retriever per turn."""
    active = list(episodes)
    while active:
        prompts = [episode.token_ids for episode in active]
        completions = agent.engine.generate(prompts, sampling, [key(episode) for episode in active])
        check_count(completions, agent.engine, [episode.question for episode in active])
        for episode, completion in zip(active, completions, strict=True):
            speak(episode, completion, agent)
        active = [episode for episode in active if episode.status is None]
        if active:
            observe(active, searcher.search([query(episode) for episode in active]), agent)
        active = [episode for episode in active if episode.status is None]


def check_engine(agent: Agent) -> None:
    """See that the engine takes sequences as long as the protocol allows.

    Args:
        agent: its engine and protocol are compared. An engine may know its limit only after the first ``sync``.

    Raises:
        UserError: it does not.
    """
    engine, limit = agent.engine, agent.protocol.max_rollout_tokens
    if engine.max_model_len is not None and engine.max_model_len < limit:
        raise UserError(
            f"{type(engine).__name__} takes at most {engine.max_model_len} tokens (max_model_len) and "
            f"protocol.max_rollout_tokens is {limit}; raise model.engine.max_model_len, or lower the protocol's limit"
        )


def check_prompt(question: Question, agent: Agent) -> tuple[int, ...]:
    """Encode the prompt of a question, and see that it leaves room.

    Args:
        question: what to ask.
        agent: its protocol and tokenizer are used.

    Returns:
        Token ids of the prompt.

    Raises:
        UserError: the prompt alone fills ``max_rollout_tokens``.
    """
    prompt = tuple(agent.tokenizer.encode_prompt(question.question, agent.protocol))
    limit = agent.protocol.max_rollout_tokens
    if len(prompt) >= limit:
        raise UserError(
            f"the prompt of question '{question.id}' has {len(prompt)} tokens and protocol.max_rollout_tokens is "
            f"{limit}; raise the limit, or leave the question out"
        )
    return prompt


def count_searches(rollout: Rollout) -> int:
    """Searches that were made, those included that failed or whose observation did not fit."""
    last = rollout.segments[-1]
    cut_off = rollout.status in (RolloutStatus.SEARCH_FAILED, RolloutStatus.TRUNCATED) and last.source == "policy"
    return rollout.num_searches + (cut_off and parse_message(last.text, rollout.prepend_think).action == "search")
