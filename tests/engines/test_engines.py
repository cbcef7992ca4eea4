from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.agents import ANSWER, SEARCH, agent_of, play, protocol, scripted_agent, teach
from transformers import AutoModelForCausalLM

from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.rollout import Draws, run_rollouts
from calibadv.agent.tools import SearchTool
from calibadv.engines import ScriptedEngine, TransformersEngine
from calibadv.numerics.rng import draw_tokens, keyed_uniforms
from calibadv.policy.loading import load_policy
from calibadv.policy.policy import Policy
from calibadv.retrieval import BM25
from calibadv.types import Completion, DrawKey, Sampling, StopReason
from calibadv.world import embedded_world


def keys(*samples: int, question: str = "q") -> list[DrawKey]:
    return [DrawKey(seed=0, step=1, question_id=question, sample=sample, turn=0) for sample in samples]


def engine_of(policy: Policy, batch_size: int = 256) -> TransformersEngine:
    engine = TransformersEngine(batch_size)
    engine.sync(policy)
    return engine


@pytest.fixture(scope="module")
def opinionated(opinionated_folder: Path) -> Policy:
    settings = json.loads((opinionated_folder / "generation_config.json").read_text())
    assert {key: settings[key] for key in ("repetition_penalty", "top_p", "top_k")} == {
        "repetition_penalty": 1.1,
        "top_p": 0.8,
        "top_k": 20,
    }
    return load_policy(str(opinionated_folder))


@pytest.fixture(scope="module")
def taught(llama_folder: Path) -> Policy:
    """Writes searches, answers and messages that end without either."""
    return teach(llama_folder, SEARCH + "\n\n", ANSWER + "\n\n", "I do not know.")


@pytest.fixture(scope="module")
def prompts(opinionated: Policy) -> list[list[int]]:
    texts = ["a", "Answer the question.", "<think> The director of the film was born in Prague. </think>", "the " * 30]
    return [opinionated.tokenizer.encode(text) for text in texts]


def forward(folder: Path, prompt: Sequence[int], completion: Completion) -> torch.Tensor:
    """Logits [N, V] of the completion's tokens from one plain pass of the model as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0]
    return logits[len(prompt) - 1 : -1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_draws_equal_a_plain_forward_pass(
    opinionated: Policy, opinionated_folder: Path, prompts: list[list[int]], temperature: float
) -> None:
    draws = keys(*range(len(prompts)))
    done = engine_of(opinionated).generate(prompts, Sampling(temperature, max_tokens=24), draws)
    assert max(len(completion.token_ids) for completion in done) == 24
    for prompt, completion, key in zip(prompts, done, draws, strict=True):
        logprobs = torch.log_softmax(forward(opinionated_folder, prompt, completion) / temperature, dim=-1)
        ids = torch.tensor(completion.token_ids)
        expected = logprobs.gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)
        # The first token whose cumulative probability is above the uniform, in the order of the vocabulary.
        uniform = keyed_uniforms(key, len(ids))
        assert completion.token_ids == tuple(inverse_cdf(logprobs.double().exp().numpy(), uniform))


def inverse_cdf(probabilities: NDArray[np.float64], uniform: NDArray[np.float32]) -> list[int]:
    return [
        next(token for token, total in enumerate(np.cumsum(row)) if total > u)
        for row, u in zip(probabilities, uniform, strict=True)
    ]


def test_draws_follow_the_softmax_over_the_whole_vocabulary(
    opinionated: Policy, opinionated_folder: Path, prompts: list[list[int]]
) -> None:
    number = 6000
    sampling = Sampling(temperature=1.0, max_tokens=1)
    done = engine_of(opinionated).generate([prompts[1]] * number, sampling, keys(*range(number)))
    counts = np.bincount([c.token_ids[0] for c in done], minlength=opinionated.model.config.vocab_size)
    expected = torch.softmax(forward(opinionated_folder, prompts[1], done[0]), dim=-1)[0].double().numpy() * number
    # Chi-square over the tokens that are expected at least five times and all others together.
    usual = expected >= 5
    observed, expected = (np.append(values[usual], values[~usual].sum()) for values in (counts, expected))
    freedom = len(observed) - 1
    assert freedom > 40  # top_k 20 of the folder would leave 20 tokens
    assert ((observed - expected) ** 2 / expected).sum() < freedom + 3 * (2 * freedom) ** 0.5
    assert observed[-1] > 0


def test_greedy_takes_the_most_likely_token(
    opinionated: Policy, opinionated_folder: Path, prompts: list[list[int]]
) -> None:
    done = engine_of(opinionated).generate(prompts, Sampling(0.0, max_tokens=12), keys(0, 1, 2, 3))
    for prompt, completion in zip(prompts, done, strict=True):
        logits = forward(opinionated_folder, prompt, completion)
        assert completion.token_ids == tuple(logits.argmax(dim=-1).tolist())
        expected = torch.log_softmax(logits, dim=-1).max(dim=-1).values
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


def test_sampling_ends_at_the_tag_at_the_end_of_sequence_or_at_the_limit(taught: Policy) -> None:
    prompt = protocol().prompt_ids("what is a?", taught.tokenizer)
    done = engine_of(taught).generate([prompt] * 60, Sampling(1.0, max_tokens=15), keys(*range(60)))
    texts = {
        reason: [taught.tokenizer.decode(c.token_ids) for c in done if c.stop_reason is reason] for reason in StopReason
    }
    assert SEARCH in texts[StopReason.TAG]
    assert all(text.endswith(("</search>", "</answer>")) for text in texts[StopReason.TAG])
    assert "I do not know." in texts[StopReason.END]
    assert len(texts[StopReason.LENGTH]) > 0
    for completion in done:
        assert len(completion.token_ids) == len(completion.logprobs) <= 15
        assert (completion.token_ids[-1] in taught.tokenizer.end_ids) == (completion.stop_reason is StopReason.END)
        assert not any(token in taught.tokenizer.end_ids for token in completion.token_ids[:-1])
        if completion.stop_reason is StopReason.LENGTH:
            assert len(completion.token_ids) == 15


@pytest.mark.parametrize("fixture", ["newline_folder", "wordpiece"])
def test_other_ways_to_cut_a_tag(fixture: str, request: pytest.FixtureRequest) -> None:
    policy = teach(request.getfixturevalue(fixture), SEARCH + "\n\n", ANSWER + "\n\n", steps=50)
    prompt = protocol().prompt_ids("what is a?", policy.tokenizer)
    done = engine_of(policy).generate([prompt] * 20, Sampling(1.0, max_tokens=40), keys(*range(20)))
    tagged = [policy.tokenizer.decode(c.token_ids) for c in done if c.stop_reason is StopReason.TAG]
    assert len(tagged) > 10
    ends = {text[-len("</search>\n") :].partition(">")[2] for text in tagged}
    assert ends == (
        {"\n", ""} if fixture == "newline_folder" else {""}
    )  # the token `>\n` is kept, its successor is not


def same(left: Sequence[Completion], right: Sequence[Completion]) -> None:
    for a, b in zip(left, right, strict=True):
        assert (a.token_ids, a.stop_reason) == (b.token_ids, b.stop_reason)
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_draws_do_not_depend_on_the_batch(taught: Policy, batch_size: int) -> None:
    prompts = [protocol().prompt_ids(f"what is {'a ' * n}a?", taught.tokenizer) for n in range(12)]
    sampling, draws = Sampling(1.0, max_tokens=30), keys(*range(12))
    together = engine_of(taught).generate(prompts, sampling, draws)
    # Rows end at different times, so that most of the batch is dropped from the cache while others go on.
    lengths = sorted(len(completion.token_ids) for completion in together)
    assert lengths[0] < lengths[6] < lengths[-1]
    same(engine_of(taught, batch_size).generate(prompts, sampling, draws), together)
    order = [7, 3, 11, 0]
    some = engine_of(taught, batch_size).generate([prompts[i] for i in order], sampling, [draws[i] for i in order])
    same(some, [together[i] for i in order])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rollouts_do_not_depend_on_the_batch(taught: Policy, batch_size: int) -> None:
    limits = {"max_searches": 2, "max_turn_tokens": 24}
    together = play(agent_of(taught, TransformersEngine(), **limits), "a", "b", "c", samples=3)
    assert {len(rollout.policy_segments) for rollout in together} == {1, 2, 3}
    other = play(agent_of(taught, TransformersEngine(batch_size), **limits), "c", "a", samples=3)
    ids = {(r.question.id, r.sample): [s.token_ids for s in r.segments] for r in together}
    assert [[s.token_ids for s in r.segments] for r in other] == [ids[r.question.id, r.sample] for r in other]
    assert [r.status for r in other] == [r.status for q in "ca" for r in together if r.question.id == q]


def test_rollouts_of_the_embedded_policy_do_not_depend_on_the_batch() -> None:
    questions = embedded_world().questions["train"][:40]
    policy = load_policy("embedded")
    agent = Agent(
        TransformersEngine(),
        Environment([SearchTool(BM25("embedded", top_k=2))]),
        protocol(prepend_think=True, max_searches=3, max_turn_tokens=36),
        policy.tokenizer,
    )
    agent.engine.sync(policy)
    draws = Draws(seed=0, step=1, samples=6, temperature=1.0)
    together = run_rollouts(questions, agent, draws)
    apart = [r for start in (0, 3, 20) for r in run_rollouts(questions[start : start + 3], agent, draws)]
    expected = {(r.question.id, r.sample): [s.token_ids for s in r.segments] for r in together}
    assert [[s.token_ids for s in r.segments] for r in apart] == [expected[r.question.id, r.sample] for r in apart]
    assert len({r.segments for r in apart}) > 30  # not all the same


def test_a_longer_limit_draws_the_same_beginning(taught: Policy) -> None:
    prompt = protocol().prompt_ids("what is a?", taught.tokenizer)
    short, long = (engine_of(taught).generate([prompt], Sampling(1.3, n), keys(5))[0].token_ids for n in (4, 9))
    assert len(long) > 4
    assert long[:4] == short


def test_updates_of_the_weights_are_seen_at_once(llama_folder: Path) -> None:
    policy = load_policy(str(llama_folder))
    engine = engine_of(policy)
    ask = ([policy.tokenizer.encode("a")], Sampling(0.0, 1), keys(0))
    (before,) = engine.generate(*ask)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(-1)
    (after,) = engine.generate(*ask)
    assert before != after


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_left_as_it_was(llama_folder: Path, training: bool) -> None:
    policy = load_policy(str(llama_folder))
    policy.model.train(training)
    engine_of(policy).generate([policy.tokenizer.encode("a")], Sampling(1.0, 2), keys(0))
    assert policy.model.training == training
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_a_batch_holds_at_least_one_prompt() -> None:
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        TransformersEngine(batch_size=0)


# Probabilities 1/2, 1/4, 0, 1/4: cumulative 1/2, 3/4, 3/4, 1.
LOGITS = torch.tensor([0.5, 0.25, 0.0, 0.25]).log()


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 0), (0.4999, 0), (0.5, 1), (0.7499, 1), (0.75, 3), (1 - 2**-24, 3)]
)
def test_inverse_cdf_by_hand(uniform: float, token: int) -> None:
    tokens, logprobs = draw_tokens(LOGITS[None], 1.0, torch.tensor([uniform]))
    assert tokens.tolist() == [token]
    assert logprobs[0].item() == pytest.approx(LOGITS[token].item())


def test_temperature_sharpens_the_distribution() -> None:
    # At 1/2 probabilities are squared: 4/16, 1/16, 0, 1/16, over their sum 6/16: 2/3, 1/6, 0, 1/6.
    tokens, logprobs = draw_tokens(LOGITS.repeat(3, 1), 0.5, torch.tensor([0.66, 0.67, 0.84]))
    assert tokens.tolist() == [0, 1, 3]
    assert logprobs.exp().tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6])


def test_greedy_takes_the_first_of_equals() -> None:
    tokens, logprobs = draw_tokens(torch.tensor([[0.0, 1.0, 1.0]]), 0.0, torch.tensor([0.99]))
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx(-np.log(2 + np.exp(-1)))  # e / (1 + 2e) = 1 / (2 + 1/e)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(temperature: float, value: float) -> None:
    with pytest.raises(ValueError, match=r"logits are not finite .* lower model.learning_rate"):
        draw_tokens(torch.tensor([[0.0, 1.0], [value, 0.0]]), temperature, torch.tensor([0.5, 0.5]))


def scripted(
    policy: Policy, replies: dict[str, list[list[str]]], default: list[list[str]] | None = None
) -> ScriptedEngine:
    engine = ScriptedEngine(replies, default)
    engine.sync(policy)
    return engine


def test_script_is_played_by_question_sample_and_turn(taught: Policy) -> None:
    engine = scripted(taught, {"q": [[SEARCH, ANSWER], ["no"]]}, default=[["other"]])
    asked = [
        DrawKey(0, 0, "q", 0, 0),
        DrawKey(0, 0, "q", 2, 1),  # the third sample starts the list again
        DrawKey(0, 0, "q", 1, 0),
        DrawKey(0, 0, "r", 0, 0),
    ]
    done = engine.generate([[0]] * 4, Sampling(1.0, 100), asked)
    assert [taught.tokenizer.decode(completion.token_ids) for completion in done] == [SEARCH, ANSWER, "no", "other"]
    assert [completion.stop_reason for completion in done] == [StopReason.TAG] * 2 + [StopReason.END] * 2
    assert done[2].token_ids[-1] in taught.tokenizer.end_ids
    assert set(done[0].logprobs) == {0.0}


def test_script_stops_where_a_policy_would(taught: Policy) -> None:
    engine = scripted(taught, {"q": [[SEARCH + "\n\nand more", SEARCH]]})
    whole, cut = engine.generate([[0]], Sampling(1.0, 100), keys(0)) + engine.generate([[0]], Sampling(1.0, 5), keys(0))
    assert taught.tokenizer.decode(whole.token_ids) == SEARCH
    assert (whole.token_ids[:5], cut.stop_reason) == (cut.token_ids, StopReason.LENGTH)


def test_a_script_that_is_too_short_says_so(taught: Policy) -> None:
    agent = scripted_agent(taught.tokenizer, {"a": [[SEARCH]]})
    with pytest.raises(ValueError, match="question 'a', sample 0 has 1 messages, and message 2 was asked for"):
        play(agent, "a")
    with pytest.raises(ValueError, match="question 'b', sample 0 has 0 messages"):
        play(agent, "b")
