"""Engines that answer wrongly are refused by their name, in the loop that goes in step and in the one that streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agents import ANSWER, SEARCH, play, scripted_agent
from transformers import AutoTokenizer

from calibadv.agent.episode import Agent
from calibadv.engines._stop import stop_reason
from calibadv.errors import UserError
from calibadv.interfaces import Engine, StreamingEngine
from calibadv.policy.policy import Policy
from calibadv.policy.tokenizer import AgentTokenizer, prepare_tags
from calibadv.types import Completion, DrawKey, Sampling, StopReason

Change = Callable[[list[Any]], Any]


class InStep(Engine):
    """Change what another engine has drawn."""

    def __init__(self, engine: Engine, change: Change) -> None:
        self.engine, self.change = engine, change

    def sync(self, policy: Policy) -> None:
        self.engine.sync(policy)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]
    ) -> list[Completion]:
        return self.change(list(self.engine.generate(prompts, sampling, keys)))  # type: ignore[no-any-return]


class Streams(StreamingEngine):
    """The same, each request by itself, in order."""

    def __init__(self, engine: Engine, change: Change) -> None:
        self.engine, self.change = engine, change
        self.drawn: dict[int, Completion] = {}

    def sync(self, policy: Policy) -> None:
        self.engine.sync(policy)

    def submit(self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]) -> list[int]:
        first = max(self.drawn, default=0) + 1
        drawn = self.change(list(self.engine.generate(prompts, sampling, keys)))
        self.drawn.update(enumerate(drawn, first))
        return list(range(first, first + len(drawn)))

    def collect(self) -> dict[int, Completion]:
        number = min(self.drawn)
        return {number: self.drawn.pop(number)}


both = pytest.mark.parametrize("kind", [InStep, Streams])
REPLIES = {"a": [[SEARCH, ANSWER]], "b": [["nothing"], [ANSWER]]}


@pytest.fixture(scope="module")
def tokenizer(llama_folder: Path) -> AgentTokenizer:
    return AgentTokenizer(AutoTokenizer.from_pretrained(llama_folder))


def agent_with(kind: Callable[[Engine, Change], Engine], tokenizer: AgentTokenizer, change: Change) -> Agent:
    agent = scripted_agent(tokenizer, REPLIES, max_turn_tokens=60)
    return replace(agent, engine=kind(agent.engine, change))


def second(change: Callable[[Completion], Any]) -> Change:
    """Change the second of several completions: the other sample of question a."""
    return lambda drawn: [drawn[0], change(drawn[1]), *drawn[2:]] if len(drawn) > 1 else drawn


def with_logprob(value: Any) -> Change:
    return second(lambda c: replace(c, logprobs=(*c.logprobs[:2], value, *c.logprobs[3:])))


def longer(by: int) -> Change:
    return second(lambda c: replace(c, token_ids=c.token_ids + (7,) * by, logprobs=c.logprobs + (0.0,) * by))


A_LOGPROB = r"gave the log-probability {} for token 3 of \d+; it is finite and at most 0, unless"


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_logprob(math.nan), A_LOGPROB.format("nan")),
        (with_logprob(-math.inf), A_LOGPROB.format("-inf")),
        (with_logprob(math.inf), A_LOGPROB.format("inf")),
        (with_logprob(0.0011), A_LOGPROB.format("0.0011")),
        (with_logprob(None), A_LOGPROB.format("None")),
        (second(lambda c: replace(c, logprobs=c.logprobs[1:])), r"gave \d+ log-probabilities for \d+ tokens; .* each"),
        (second(lambda c: replace(c, logprobs=None)), "gave None as logprobs; they are a tuple"),
        (longer(60), r"gave \d+ tokens; at most 60 were asked for"),
        (longer(2), r"gave 2 tokens behind the one that ends the message \(.*</search>'\); it gives none"),
        (second(lambda c: c.token_ids), r"gave tuple \(\d.*; it gives a calibadv\.types\.Completion"),
        (second(lambda c: None), "gave None; it gives a calibadv"),
    ],
)
def test_what_cannot_be_a_completion_is_refused(
    kind: Callable[[Engine, Change], Engine], change: Change, message: str, tokenizer: AgentTokenizer
) -> None:
    place = r" \(question 'a', sample 1, message 1\)$"
    with pytest.raises(UserError, match=f"^{kind.__name__} {message}.*{place}"):  # type: ignore[attr-defined]
        play(agent_with(kind, tokenizer, change), "a", "b", samples=2)


@both
@pytest.mark.parametrize("end", [True, False])
def test_what_stands_behind_an_end_of_sequence_is_refused(
    kind: Callable[[Engine, Change], Engine], end: bool, tokenizer: AgentTokenizer
) -> None:
    """Question b's first message is text without a tag, and ends with that token."""
    more = (tokenizer.encode("so")[0] if not end else min(tokenizer.end_ids),)

    def change(drawn: list[Any]) -> list[Any]:
        return [replace(c, token_ids=c.token_ids + more, logprobs=(*c.logprobs, 0.0)) for c in drawn]

    with pytest.raises(UserError, match=rf"{kind.__name__} gave 1 tokens behind .*\(question 'b', sample 0, message 1"):  # type: ignore[attr-defined]
        play(agent_with(kind, tokenizer, change), "b")


@both
@pytest.mark.parametrize(("change", "given"), [(lambda c: c[1:], 1), (lambda c: [*c, c[0]], 3)])
def test_as_many_answers_as_prompts(
    kind: Callable[[Engine, Change], Engine], change: Change, given: int, tokenizer: AgentTokenizer
) -> None:
    message = rf"^{kind.__name__} gave {given} answers to 2 prompts, of question 'a' first; it gives one to each"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=message):
        play(agent_with(kind, tokenizer, change), "a", "b")


def test_no_list_at_all(tokenizer: AgentTokenizer) -> None:
    with pytest.raises(UserError, match=r"^InStep gave None to 1 prompts, of question 'a' first"):
        play(agent_with(InStep, tokenizer, lambda _: None), "a")


@pytest.mark.parametrize(("collected", "shown"), [({99: None}, "99"), (None, "None")])
def test_a_request_that_nobody_made_is_refused(collected: Any, shown: str, tokenizer: AgentTokenizer) -> None:
    class Confused(Streams):
        def collect(self) -> dict[int, Completion]:
            return collected  # type: ignore[no-any-return]

    with pytest.raises(
        UserError, match=rf"^Confused collected {shown}, .* \(there are 2, that of question 'a' first\)"
    ):
        play(agent_with(Confused, tokenizer, lambda drawn: drawn), "a", "b")


@both
def test_rounding_above_0_and_numbers_of_numpy_are_taken(
    kind: Callable[[Engine, Change], Engine], tokenizer: AgentTokenizer
) -> None:
    """What a log-softmax in half precision gives a token that is certain."""

    def change(drawn: list[Any]) -> list[Any]:
        return [replace(c, logprobs=(np.float32(9e-4),) * len(c.token_ids)) for c in drawn]

    rollouts = play(agent_with(kind, tokenizer, change), "a", "b")
    assert [len(rollout.policy_segments) for rollout in rollouts] == [2, 1]


class Plays(Engine):
    """Give the same tokens whatever is asked."""

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = token_ids

    def sync(self, policy: Policy) -> None:
        pass

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]
    ) -> list[Completion]:
        return [Completion(self.token_ids, (-1.0,) * len(self.token_ids), StopReason.END) for _ in prompts]


@pytest.fixture(scope="module", params=["llama_folder", "newline_folder", "wordpiece"])
def any_tokenizer(request: pytest.FixtureRequest) -> AgentTokenizer:
    """Tags of several tokens; of which the last may hold a newline too; of one token."""
    backend = AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))
    prepare_tags(backend)
    return AgentTokenizer(backend)


@settings(max_examples=40)
@given(data=st.data())
def test_exactly_what_goes_on_behind_its_end_is_refused(any_tokenizer: AgentTokenizer, data: st.DataObject) -> None:
    """Against ``stop_reason``, which engines ask token by token."""
    pieces = ["</search>", "</answer>", "</", "search", ">", "\n", "Prague", "<think>", " "]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=12)))
    token_ids = any_tokenizer.encode(text) + data.draw(st.sampled_from([[], [min(any_tokenizer.end_ids)]]))
    ends = [n for n in range(1, len(token_ids) + 1) if stop_reason(any_tokenizer, token_ids[:n])]
    agent = scripted_agent(any_tokenizer, {}, max_searches=1)
    agent = replace(agent, engine=Plays(*token_ids))
    if ends and ends[0] < len(token_ids):
        with pytest.raises(UserError, match=f"gave {len(token_ids) - ends[0]} tokens behind"):
            play(agent, "a")
    elif token_ids:
        (rollout,) = play(agent, "a")
        assert rollout.segments[0].token_ids == tuple(token_ids)
