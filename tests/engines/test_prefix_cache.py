"""Turns that go on from the key-value cache of the turn before are those that read everything again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.agents import ANSWER, KINDS, SEARCH, agent_of, play, protocol, teach, tokenizers_of_all_kinds
from transformers import AutoConfig, AutoModelForCausalLM

from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.rollout import Draws, run_rollouts
from calibadv.agent.tools import SearchTool
from calibadv.engines import TransformersEngine
from calibadv.engines._stop import stop_candidates, stop_reason
from calibadv.engines.transformers import unsharded_copy
from calibadv.policy.loading import load_policy
from calibadv.policy.lora import Lora
from calibadv.policy.policy import Policy
from calibadv.retrieval import BM25
from calibadv.types import Completion, DrawKey, Rollout, Sampling, StopReason
from calibadv.world import embedded_world


class PrefillingEngine(TransformersEngine):
    """Reads every prompt from its beginning."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]
    ) -> list[Completion]:
        self.release()
        return super().generate(prompts, sampling, keys)


@pytest.fixture(scope="module")
def taught(llama_folder: Path) -> Policy:
    return teach(llama_folder, SEARCH + "\n\n", ANSWER + "\n\n", "I do not know.")


@pytest.fixture
def read(taught: Policy) -> Iterator[list[tuple[int, int]]]:
    """Rows and columns of what the model was given at each forward pass."""
    shapes: list[tuple[int, int]] = []
    hook = taught.model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


def records(rollouts: Sequence[Rollout]) -> list[tuple[object, ...]]:
    return [(r.question.id, r.sample, r.status, [s.token_ids for s in r.segments]) for r in rollouts]


def assert_same(kept: Sequence[Rollout], again: Sequence[Rollout]) -> None:
    assert records(kept) == records(again)
    for one, other in zip(kept, again, strict=True):
        for left, right in zip(one.policy_segments, other.policy_segments, strict=True):
            torch.testing.assert_close(torch.tensor(left.logprobs), torch.tensor(right.logprobs), atol=5e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_embedded_policy_goes_on_as_if_it_read_everything_again(
    embedded_policy: Policy, temperature: float
) -> None:
    def sample(engine: TransformersEngine) -> list[Rollout]:
        engine.sync(embedded_policy)
        rules = protocol(prepend_think=True, max_searches=3, max_turn_tokens=36)
        agent = Agent(
            engine, Environment([SearchTool(BM25(corpus="embedded", top_k=2))]), rules, embedded_policy.tokenizer
        )
        questions = embedded_world().questions["validation"][:12]
        return run_rollouts(questions, agent, Draws(seed=0, step=1, samples=4, temperature=temperature))

    kept = sample(TransformersEngine())
    assert len({rollout.num_searches for rollout in kept}) > 1  # some leave while others go on
    assert_same(kept, sample(PrefillingEngine()))


@pytest.mark.parametrize("folder", ["qwen3_folder", "newline_folder", "wordpiece"])
def test_other_policies_do_so_too(folder: str, request: pytest.FixtureRequest) -> None:
    policy = teach(request.getfixturevalue(folder), SEARCH + "\n\n", ANSWER + "\n\n", steps=50)
    kept, again = (
        play(agent_of(policy, engine, max_searches=3, max_turn_tokens=40), "a", "b", samples=12)
        for engine in (TransformersEngine(), PrefillingEngine())
    )
    assert max(rollout.num_searches for rollout in kept) >= 2
    assert_same(kept, again)


def first_turn(policy: Policy, engine: TransformersEngine) -> tuple[list[list[int]], list[DrawKey]]:
    """Sample a turn of 24 rollouts, and prepare the next one of those that searched."""
    prompts = [protocol().prompt_ids(f"what is {'abc'[n % 3]}?", policy.tokenizer) for n in range(24)]
    turns = [DrawKey(0, 1, "q", n, 0) for n in range(24)]
    done = engine.generate(prompts, Sampling(1.0, 24), turns)
    back = [
        n
        for n in range(24)
        if done[n].stop_reason is StopReason.TAG and "</search>" in policy.tokenizer.decode(done[n].token_ids)
    ]
    assert len(back) > 5
    observation = policy.tokenizer.encode("\n\n<information>Doc 1(Title: Prague) Prague</information>\n\n")
    following = [[*prompts[n], *done[n].token_ids, *observation, *([7] * (n % 4))] for n in back]
    return following, [replace(turns[n], turn=1) for n in back]


def synced(policy: Policy, engine: TransformersEngine | None = None) -> TransformersEngine:
    engine = engine or TransformersEngine()
    engine.sync(policy)
    return engine


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_come_back_mix_with_new_ones(taught: Policy, temperature: float) -> None:
    engine, sampling = synced(taught), Sampling(temperature, 24)
    prompts, turns = first_turn(taught, engine)
    # One is new; one has a key that is known and a prompt that is not; one that comes back stays away.
    new = protocol().prompt_ids("what is b?", taught.tokenizer)
    prompts = [prompts[0], new, *prompts[2:], new]
    turns = [turns[0], replace(turns[1], question_id="r"), *turns[2:], turns[1]]
    together = engine.generate(prompts, sampling, turns)
    for prompt, turn, completion in zip(prompts, turns, together, strict=True):
        (alone,) = synced(taught).generate([prompt], sampling, [turn])
        assert (alone.token_ids, alone.stop_reason) == (completion.token_ids, completion.stop_reason)
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(completion.logprobs), atol=5e-5, rtol=0)


def test_only_what_is_new_is_read(taught: Policy, read: list[tuple[int, int]]) -> None:
    engine = synced(taught)
    prompts, turns = first_turn(taught, engine)
    read.clear()
    engine.generate(prompts, Sampling(1.0, 2), turns)
    observation = taught.tokenizer.encode("\n\n<information>Doc 1(Title: Prague) Prague</information>\n\n")
    rows, columns = read[0]
    # The observation with up to three more tokens, and the last token of the message, which nothing has read so far.
    assert rows == len(prompts)
    assert len(observation) < columns <= len(observation) + 4


@pytest.mark.parametrize("forget", ["sync", "rest", "a turn of others", "more prompts than batch_size"])
def test_the_cache_is_dropped(taught: Policy, read: list[tuple[int, int]], forget: str) -> None:
    engine = synced(taught, TransformersEngine(23) if forget.startswith("more") else None)
    prompts, turns = first_turn(taught, engine)
    if forget == "sync":
        engine.sync(taught)
    elif forget == "rest":
        engine.release()
    elif forget == "a turn of others":
        engine.generate([prompts[0]], Sampling(1.0, 1), [replace(turns[0], question_id="r")])
    read.clear()
    engine.generate(prompts, Sampling(1.0, 1), turns)
    assert read[0] == (len(set(map(tuple, prompts))), max(map(len, prompts)))


def test_an_update_between_two_turns_is_seen(llama_folder: Path) -> None:
    policy = teach(llama_folder, SEARCH, steps=40)
    engine = synced(policy)
    prompts, turns = first_turn(policy, engine)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)
    engine.sync(policy)
    assert engine.generate(prompts, Sampling(1.0, 8), turns) == synced(policy).generate(
        prompts, Sampling(1.0, 8), turns
    )


def test_equal_prompts_are_read_once(taught: Policy, read: list[tuple[int, int]]) -> None:
    one, two = (protocol().prompt_ids(f"what is {name}?", taught.tokenizer) for name in ("a", "b b"))
    prompts, turns = [one, two, one, one], [DrawKey(0, 1, "q", n, 0) for n in range(4)]
    together = synced(taught).generate(prompts, Sampling(1.0, 24), turns)
    assert read[0] == (2, max(len(one), len(two)))
    alone = [synced(taught).generate([prompts[n]], Sampling(1.0, 24), [turns[n]])[0] for n in range(4)]
    assert [completion.token_ids for completion in together] == [completion.token_ids for completion in alone]


def test_layers_with_a_window_keep_nothing_and_sample_the_same(taught: Policy) -> None:
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=taught.model.config.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    )
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config), taught.tokenizer)
    prompts = [taught.tokenizer.encode("the director " * n) for n in (3, 5, 5)]
    done = synced(policy).generate(prompts, Sampling(1.0, 20), [DrawKey(0, 1, "q", n, 0) for n in range(3)])
    for prompt, completion in zip(prompts, done, strict=True):
        ids = torch.tensor([*prompt, *completion.token_ids])
        with torch.no_grad():
            logprobs = policy.model(ids[None]).logits[0].log_softmax(dim=-1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(1, ids[len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


def test_any_attention_samples_the_same(taught: Policy, llama_folder: Path) -> None:
    eager = load_policy(str(llama_folder))
    eager.model.load_state_dict(taught.model.state_dict())
    eager.model.set_attn_implementation("eager")
    prompts = [protocol().prompt_ids(f"what is {'a ' * n}a?", taught.tokenizer) for n in range(6)]
    turns = [DrawKey(0, 1, "q", n, 0) for n in range(6)]
    ours, theirs = (synced(policy).generate(prompts, Sampling(1.0, 80), turns) for policy in (taught, eager))
    assert [completion.token_ids for completion in ours] == [completion.token_ids for completion in theirs]
    assert (taught.model.config._attn_implementation, eager.model.config._attn_implementation) == ("sdpa", "eager")


def test_mixed_precision_leaves_the_gradient_of_the_update_alone(taught: Policy) -> None:
    prompt = protocol().prompt_ids("what is a?", taught.tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        (completion,) = synced(taught).generate([prompt], Sampling(1.0, 8), [DrawKey(0, 1, "q", 0, 0)])
        logits = taught.model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0]
        logprobs = logits.float().log_softmax(dim=-1)[len(prompt) - 1 : -1]
        chosen = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        chosen.sum().backward()
    # bfloat16 keeps 8 bits of each weight: log-probabilities of a few units agree to a few hundredths.
    torch.testing.assert_close(torch.tensor(completion.logprobs), chosen.detach(), atol=0.1, rtol=0)
    assert all(bool(parameter.grad.any()) for parameter in taught.model.parameters())
    taught.model.zero_grad()


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_an_unsharded_copy_follows_the_policy(llama_folder: Path, lora: Lora | None) -> None:
    policy = load_policy(str(llama_folder), lora)
    ids = torch.tensor([policy.tokenizer.encode("the director of the film")])
    copy = unsharded_copy(policy)
    for _ in range(2):
        with torch.no_grad():
            assert torch.allclose(copy(ids).logits, policy.model(ids).logits, atol=1e-5)
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02)
            assert not torch.allclose(copy(ids).logits, policy.model(ids).logits, atol=1e-3)
        assert unsharded_copy(policy, copy) is copy
    assert not copy.training


@pytest.mark.parametrize("kind", KINDS)
def test_no_end_is_overlooked(kind: str, llama_folder: Path, newline_folder: Path, wordpiece: Path) -> None:
    tokenizer = tokenizers_of_all_kinds(llama_folder, newline_folder, wordpiece)[kind]
    table = stop_candidates(tokenizer, len(tokenizer.backend))
    assert 0 < int(table.sum()) < len(table) // 4
    for message in (SEARCH + "\n\n", ANSWER + "\n", "so</search>.", "I do not know."):
        token_ids = [*tokenizer.encode(message), *tokenizer.end_ids]
        ends = [n for n in range(len(token_ids)) if stop_reason(tokenizer, token_ids[: n + 1]) is not None]
        assert ends
        assert all(table[token_ids[n]] for n in ends)
