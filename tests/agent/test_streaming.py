from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.agents import ANSWER, SEARCH, play, retriever, scripted_agent
from transformers import AutoTokenizer

from calibadv.agent.episode import Agent
from calibadv.engines import VLLMEngine
from calibadv.errors import UserError
from calibadv.interfaces import Engine, Retriever, StreamingEngine
from calibadv.numerics.rng import request_seed
from calibadv.policy.loading import load_policy
from calibadv.policy.policy import Policy
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.types import Completion, DrawKey, RolloutStatus, Sampling, ScoredDocument

Choose = Callable[[list[DrawKey]], int | None]
"""Which of the requests under way ends next, or None for none just now."""


class Unordered(StreamingEngine):
    """Draw what another engine draws, and end the requests in an order of the test's choice."""

    def __init__(self, engine: Engine, choose: Choose) -> None:
        self.engine, self.choose = engine, choose
        self.under_way: dict[int, tuple[DrawKey, Completion]] = {}
        self.submitted: list[DrawKey] = []
        self.ended: list[DrawKey] = []

    def sync(self, policy: Policy) -> None:
        self.engine.sync(policy)

    def submit(self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]) -> list[int]:
        numbers = [len(self.submitted) + place for place in range(len(keys))]
        self.submitted += keys
        completions = self.engine.generate(prompts, sampling, keys)
        self.under_way.update(zip(numbers, zip(keys, completions, strict=True), strict=True))
        return numbers

    def collect(self) -> dict[int, Completion]:
        place = self.choose([key for key, _ in self.under_way.values()])
        if place is None:
            return {}
        number = list(self.under_way)[place]
        key, completion = self.under_way.pop(number)
        self.ended.append(key)
        return {number: completion}

    def release(self) -> None:
        self.under_way.clear()


class Hooked(Retriever):
    """Keeps the queries of each call of another retriever, and first does what the test says."""

    def __init__(self, before: Callable[[list[str]], object] = len, **arguments: Any) -> None:
        self.retriever, self.before = retriever(**arguments), before
        self.top_k = self.retriever.top_k
        self.calls: list[list[str]] = []

    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        self.calls.append(list(queries))
        self.before(list(queries))
        return self.retriever.search(queries, top_k)


FILM = "<think> c </think> <search> film </search>"
REPLIES = {
    "a": [[SEARCH, FILM, ANSWER], [ANSWER], ["nothing"]],
    "b": [[FILM, FILM, FILM, FILM], ["<think> d </think> <search> </search>"]],
    "c": [[SEARCH, ANSWER], [FILM, "<think> cut off"], [SEARCH, SEARCH, ANSWER]],
}


@pytest.fixture(scope="module")
def tokenizer(llama_folder: Path) -> AgentTokenizer:
    return AgentTokenizer(AutoTokenizer.from_pretrained(llama_folder))


def streaming(agent: Agent, choose: Choose) -> tuple[Agent, Unordered]:
    engine = Unordered(agent.engine, choose)
    return replace(agent, engine=engine), engine


def first(_: list[DrawKey]) -> int:
    return 0


@given(orders=st.lists(st.none() | st.integers(0, 11), max_size=60))
def test_records_are_those_of_the_loop_that_goes_in_step(tokenizer: AgentTokenizer, orders: list[int | None]) -> None:
    agent = scripted_agent(tokenizer, REPLIES, max_searches=3, max_turn_tokens=60)
    expected = play(agent, *REPLIES, samples=3)
    assert len({rollout.status for rollout in expected}) == 3
    assert {len(rollout.policy_segments) for rollout in expected} == {1, 2, 3, 4}
    choices = iter(orders)

    def choose(under_way: list[DrawKey]) -> int | None:
        choice = next(choices, 0)
        return None if choice is None else choice % len(under_way)

    agent, engine = streaming(agent, choose)
    assert play(agent, *REPLIES, samples=3) == expected
    assert engine.under_way == {}
    assert len(engine.submitted) == sum(len(rollout.policy_segments) for rollout in expected)


def test_no_rollout_waits_for_the_slowest(tokenizer: AgentTokenizer) -> None:
    def choose(under_way: list[DrawKey]) -> int | None:
        """The first message of c comes last of all, after the others have had their last."""
        others = [place for place, key in enumerate(under_way) if key.question_id != "c"]
        if others:
            return others[0]
        done = {key for key in engine.ended if key.turn == 2}
        return 0 if len(done) == 2 else None

    replies = {name: [[SEARCH, FILM, ANSWER]] for name in "abc"}
    agent, engine = streaming(scripted_agent(tokenizer, replies), choose)
    rollouts = play(agent, "a", "b", "c")
    assert [rollout.num_searches for rollout in rollouts] == [2, 2, 2]
    assert [(key.question_id, key.turn) for key in engine.ended[-3:]] == [("c", 0), ("c", 1), ("c", 2)]


def test_sampling_goes_on_during_a_search_and_the_next_one_takes_all_that_have_asked(tokenizer: AgentTokenizer) -> None:
    asked = Event()

    def choose(under_way: list[DrawKey]) -> int | None:
        if {key.turn for key in under_way} == {0} and len(under_way) == 1:
            asked.set()  # three of four have written their search; only then does the first search come back
        return 0

    replies = {name: [[SEARCH, ANSWER]] for name in "abcd"}
    search = Hooked(lambda _: asked.wait(timeout=10))
    agent, _ = streaming(scripted_agent(tokenizer, replies, search), choose)
    rollouts = play(agent, *"abcd")
    assert all(rollout.status is RolloutStatus.ANSWERED for rollout in rollouts)
    assert len(search.calls[0]) == 1
    assert sum(map(len, search.calls)) == 4
    assert len(search.calls) in (2, 3)  # the last one may have come just after the second search began


def test_a_failed_search_ends_its_own_rollout_only(tokenizer: AgentTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    asked = Event()

    def choose(under_way: list[DrawKey]) -> int | None:
        if {key.turn for key in under_way} == {0} and len(under_way) == 1:
            asked.set()
        return 0

    # a's first search comes back only after b and c have asked: theirs are one call, in which c's fails.
    replies = {name: [[SEARCH, ANSWER]] for name in "abd"} | {"c": [[FILM, ANSWER]]}
    search = Hooked(lambda _: asked.wait(timeout=10), failing=["film"])
    agent, _ = streaming(scripted_agent(tokenizer, replies, search), choose)
    statuses = [rollout.status for rollout in play(agent, *"abcd")]
    answered = RolloutStatus.ANSWERED
    assert statuses == [answered, answered, RolloutStatus.SEARCH_FAILED, answered]
    assert {"capital", "film"} <= set(search.calls[1])
    [line] = caplog.messages
    assert line.startswith(f"1 of {len(search.calls[1])} searches failed, their rollouts are left out: ")


def test_a_bug_in_a_retriever_stops_the_run_and_leaves_nothing_under_way(tokenizer: AgentTokenizer) -> None:
    def fail(queries: list[str]) -> None:
        raise KeyError("a bug")

    agent, engine = streaming(scripted_agent(tokenizer, REPLIES, Hooked(fail), max_turn_tokens=60), first)
    with pytest.raises(UserError, match=r"Hooked\.search raised KeyError \('a bug'\)"):
        play(agent, *REPLIES, samples=3)
    assert engine.under_way == {}


def test_generate_waits_for_all_and_keeps_their_order(tokenizer: AgentTokenizer) -> None:
    agent, engine = streaming(scripted_agent(tokenizer, REPLIES), lambda under_way: len(under_way) - 1)
    keys = [DrawKey(0, 1, name, 0, 0) for name in ("a", "b", "a")]
    ask = ([[0]] * 3, Sampling(1.0, 50), keys)
    assert agent.engine.generate(*ask) == engine.engine.generate(*ask)
    assert engine.ended == keys[::-1]


def test_an_engine_that_takes_less_than_the_protocol_allows_is_refused(tokenizer: AgentTokenizer) -> None:
    agent, engine = streaming(scripted_agent(tokenizer, REPLIES, max_rollout_tokens=512, max_turn_tokens=60), first)
    engine.max_model_len = 511
    with pytest.raises(ValueError, match=r"Unordered takes at most 511 .*max_rollout_tokens is 512; raise"):
        play(agent, "a")
    assert engine.submitted == []
    engine.max_model_len = 512
    assert len(play(agent, "a")) == 1


def test_the_seed_of_a_request_is_the_beginning_of_its_digest() -> None:
    # The digest of the key's fields as JSON; 63 bits, so that a signed 64-bit integer holds them.
    digest = blake2b(b'[3, 7, "q", 1, 2]', digest_size=16).digest()
    bits = "".join(f"{byte:08b}" for byte in digest)
    assert request_seed(DrawKey(3, 7, "q", 1, 2)) == int(bits[:63], 2)
    assert request_seed(DrawKey(3, 7, "q", 1, 3)) != request_seed(DrawKey(3, 7, "q", 2, 2))


def test_vllm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, llama_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not there
    with pytest.raises(ValueError, match=r"vLLM, which is not installed; run: pip install 'calibadv\[vllm\]'"):
        VLLMEngine().sync(load_policy(str(llama_folder)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_model_len": 0}, "max_model_len is 0; it must be at least 1"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; it must be at least 1"),
        ({"gpu_memory_utilization": 1.2}, "gpu_memory_utilization is 1.2; it must be above 0 and at most 1"),
        ({"kv_cache_gib": 0.0}, "kv_cache_gib is 0.0; it must be above 0"),
    ],
)
def test_settings_of_vllm_that_make_no_sense(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        VLLMEngine(**settings)
