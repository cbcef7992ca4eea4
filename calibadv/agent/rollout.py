"""The multi-turn loop: the policy writes, the environment acts, until every rollout has ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from calibadv.agent.completions import check_count
from calibadv.agent.episode import (
    Agent,
    Episode,
    append_message,
    append_observations,
    new_episode,
    to_rollout,
    unfinished,
)
from calibadv.agent.patience import PatientEnvironment, Waiting
from calibadv.agent.streaming import Key, run_streaming
from calibadv.distributed import SINGLE_PROCESS, ProcessGroup
from calibadv.errors import UserError
from calibadv.interfaces import StreamingEngine
from calibadv.types import DrawKey, Question, Rollout, RolloutStatus, Sampling


@dataclass(frozen=True, slots=True)
class Draws:
    """The number of rollouts to sample of each question, and what their randomness depends on."""

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
    """Sample rollouts: all in lockstep, or each at its own pace where the engine batches continuously.

    Token ids are kept as they were sampled and shown; text is decoded from them to be read, and never encoded again.

    Args:
        questions: B questions, all ranks' together.
        agent: engine, environment, protocol and tokenizer.
        draws: samples per question, temperature, seed and rollout step.
        processes: the ranks that share the questions; this one samples for those that it owns.
        waiting: how long a retriever that is away may be waited for; by default not at all.

    Returns:
        ``draws.samples`` rollouts per question of this rank, neighbours in the list.

    Raises:
        UserError: a prompt leaves no room for a message within ``max_rollout_tokens``, the engine is made for less or
            answers wrongly, or a tool returns what is no result.
        RetrievalError: the retriever was away for longer than it may be waited for.
        StopRequestedError: the run is to stop, and the retriever is away.
    """
    check_engine(agent)
    episodes = _start(questions, agent, draws.samples, processes)
    sampling = Sampling(draws.temperature, agent.protocol.max_turn_tokens)

    def key(episode: Episode) -> DrawKey:
        return DrawKey(draws.seed, draws.step, episode.question.id, episode.sample, turn=len(episode.messages))

    environment = PatientEnvironment(agent.environment, waiting)
    try:
        if isinstance(agent.engine, StreamingEngine):
            run_streaming(episodes, agent.engine, agent, environment, sampling, key)
        else:
            _run_lockstep(episodes, agent, environment, sampling, key)
    finally:
        agent.engine.release()
    return [to_rollout(episode, draws.step, agent.protocol) for episode in episodes]


def _start(questions: Sequence[Question], agent: Agent, samples: int, processes: ProcessGroup) -> list[Episode]:
    episodes: list[Episode] = []
    sampled: Counter[str] = Counter()
    owners = processes.assign_ranks([question.id for question in questions])
    for question, owner in zip(questions, owners, strict=True):
        # A question that the batch holds twice goes on counting: equal keys would draw equal rollouts.
        first = sampled[question.id]
        sampled[question.id] += samples
        if owner == processes.rank:
            prompt_ids = check_prompt(question, agent)
            episodes += [new_episode(question, first + n, prompt_ids, agent) for n in range(samples)]
    return episodes


def _run_lockstep(
    episodes: Sequence[Episode], agent: Agent, environment: PatientEnvironment, sampling: Sampling, key: Key
) -> None:
    """Run all episodes turn by turn: one call of the engine and one of each tool per turn."""
    active = list(episodes)
    while active:
        prompts = [episode.token_ids for episode in active]
        completions = agent.engine.generate(prompts, sampling, [key(episode) for episode in active])
        check_count(completions, agent.engine, [episode.question for episode in active])
        for episode, completion in zip(active, completions, strict=True):
            append_message(episode, completion, agent)
        active = unfinished(active)
        if active:
            append_observations(active, environment.step([episode.calls for episode in active]), agent)
        active = unfinished(active)


def check_engine(agent: Agent) -> None:
    """Check that the engine takes sequences as long as the protocol allows.

    An engine may know its limit only after the first ``sync``.
    """
    engine, limit = agent.engine, agent.protocol.max_rollout_tokens
    if engine.max_model_len is not None and engine.max_model_len < limit:
        raise UserError(
            f"{type(engine).__name__} takes at most {engine.max_model_len} tokens (max_model_len) and "
            f"protocol.max_rollout_tokens is {limit}; raise model.engine.max_model_len, or lower the protocol's limit"
        )


def check_prompt(question: Question, agent: Agent) -> tuple[int, ...]:
    """Encode the prompt of a question, and check that it leaves room for a message."""
    tokens = agent.protocol.prompt_ids(question.question, agent.tokenizer, agent.environment.tools)
    limit = agent.protocol.max_rollout_tokens
    if len(tokens) >= limit:
        raise UserError(
            f"the prompt of question '{question.id}' has {len(tokens)} tokens and protocol.max_rollout_tokens is "
            f"{limit}; raise the limit, or leave the question out"
        )
    return tuple(tokens)


def count_searches(rollout: Rollout) -> int:
    """Count the searches that were made, those included that failed or whose observation did not fit."""
    cut_off = rollout.status in (RolloutStatus.SEARCH_FAILED, RolloutStatus.TRUNCATED)
    unanswered = cut_off and rollout.segments[-1].source == "policy" and bool(rollout.messages[-1].calls)
    return rollout.num_searches + unanswered
