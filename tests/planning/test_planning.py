from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fits import files
from transformers import AutoConfig, AutoModelForCausalLM

from calibadv.cli.main import main
from calibadv.planning.command import PlanCLI, read_job
from calibadv.planning.job import GIB, PRECISIONS, Assumptions, Gpu, Job, Precision, Sampler
from calibadv.planning.memory import MemoryItem, fits, kv_bytes, layer_bytes, memory_items, peak, remedies, rows_at_once
from calibadv.planning.model_shape import ModelShape, empty_model, read_shape
from calibadv.planning.time import decode_seconds, pass_flops, read_seconds, step_times, validation_seconds


def config(hidden: int, layers: int, heads: int, kv_heads: int, wide: int, vocabulary: int, *, tied: bool) -> Any:
    return AutoConfig.for_model(
        "qwen2",
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=wide,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


QWEN_3B = config(2048, 36, 16, 2, 11008, 151936, tied=True)
QWEN_7B = config(3584, 28, 28, 4, 18944, 152064, tied=False)

# 10 layers of 100 parameters and 1,000 x 8 outside of them: 9,000 in all.
SHAPE = ModelShape(9000, 100, 10, hidden=8, query_width=8, kv_width=4, intermediate=16, vocabulary=1000)
NOTHING = Assumptions(mfu=0.5, bandwidth_share=0.5, launch_seconds=0.0, reserve=0.0)
# 10^6 operations and 1,000 bytes a second.
GPU = Gpu(memory=1e9, tflops=1e-6, tflops32=1e-6, bandwidth=1000.0, link=1000.0)
JOB = Job(
    shape=SHAPE,
    trained=9000,
    gpu=GPU,
    precision=PRECISIONS["32-true"],
    sampler=Sampler("transformers", batch_size=4),
    questions=2,
    group_size=3,
    max_rollout_tokens=100,
    mean_rollout_tokens=50,
    mean_policy_tokens=20,
    max_turns=2,
    micro_batch_tokens=200,
    assumed=NOTHING,
)
# A 3B model with the batch of the paper.
LARGE = replace(
    JOB,
    shape=ModelShape(3_085_938_688, 77_076_992, 36, 2048, 2048, 256, 11008, 151936),
    trained=3_085_938_688,
    questions=512,
    max_rollout_tokens=4096,
    mean_rollout_tokens=2600,
    mean_policy_tokens=900,
    micro_batch_tokens=16384,
)


def part(job: Job, name: str) -> MemoryItem:
    return next(part for part in memory_items(job) if part.name.startswith(name))


@pytest.mark.parametrize(
    ("published", "parameters", "layer"),
    [
        # Of a layer: q and o H x H, k and v H x KV, biases of q, k and v, three of H x I, two norms.
        # 3B: 2 x 2048^2 + 2 x 2048 x 256 + 2048 + 512 + 3 x 2048 x 11008 + 4096 = 77,076,992; 36 of them, an embedding
        # of 151936 x 2048 and a last norm of 2048: 3,085,938,688.
        (QWEN_3B, 3_085_938_688, 77_076_992),
        # 7B: 2 x 3584^2 + 2 x 3584 x 512 + 3584 + 1024 + 3 x 3584 x 18944 + 7168 = 233,057,792; 28 of them, two tables
        # of 152064 x 3584 and a norm of 3584: 7,615,616,512.
        (QWEN_7B, 7_615_616_512, 233_057_792),
    ],
)
def test_parameters_are_counted_without_weights(published: Any, parameters: int, layer: int) -> None:
    shape = read_shape(empty_model(published))
    assert (shape.parameters, shape.layer_parameters, shape.layers) == (parameters, layer, published.num_hidden_layers)
    assert shape.head_parameters == published.vocab_size * published.hidden_size
    assert shape.body_parameters + shape.outer_parameters == parameters


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2"])
def test_other_kinds_of_models_are_read(kind: str) -> None:
    names = {"n_embd": 64, "n_layer": 3, "n_head": 4} if kind == "gpt2" else {"hidden_size": 64, "num_hidden_layers": 3}
    model = empty_model(AutoConfig.for_model(kind, vocab_size=100, **names))
    shape = read_shape(model)
    assert (shape.layers, shape.hidden) == (3, 64)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_weights_gradients_and_averages_by_hand() -> None:
    """9,000 parameters of four bytes; AdamW has two averages of each, and works on one copy more."""
    assert part(JOB, "weights").phases == (36000,) * 4
    assert part(JOB, "gradients").phases == (36000,) * 4
    assert part(JOB, "optimizer (").phases == (72000,) * 4
    assert part(JOB, "optimizer's").phases == (0, 0, 0, 36000)


def test_what_processes_share_and_what_they_repeat() -> None:
    ddp = replace(JOB, processes=2, questions=4)
    assert part(ddp, "weights").update == 36000
    assert part(ddp, "gradient buckets").update == 36000
    assert all(not one.name.startswith("gradient buckets") for one in memory_items(replace(ddp, bucket_view=True)))
    fsdp = replace(ddp, sharded=True)
    assert part(fsdp, "weights").update == 18000
    assert part(fsdp, "optimizer (").update == 36000
    # Whole at a time: the 8,000 outside of layers and two layers, and on the way back gradients of 8,000 and a layer.
    assert part(fsdp, "gathered").phases == (0, 4 * 8200, 4 * (8200 + 8100), 0)
    assert part(fsdp, "whole copy").rollout == 36000  # the engine runs the model alone
    assert all(not one.name.startswith("whole copy") for one in memory_items(replace(fsdp, sampler=Sampler("vllm"))))


def test_adapters_leave_the_base_without_gradients() -> None:
    lora = replace(JOB, trained=500, lora=True, runs_reference=True)
    assert part(lora, "weights").update == 4 * 9500
    assert part(lora, "gradients").update == 2000
    names = [one.name for one in memory_items(lora)]
    assert "reference" not in names  # the policy with its adapters off
    assert part(replace(JOB, holds_reference=True, runs_reference=True), "reference").update == 36000
    half = replace(JOB, precision=PRECISIONS["bf16-true"], holds_reference=True, runs_reference=True)
    assert part(half, "reference").update == 18000
    # 9,000 weights of two bytes, 500 adapters and their gradients of four.
    half = replace(half, trained=500, lora=True, holds_reference=False)
    assert (part(half, "weights").update, part(half, "gradients").update) == (20000, 2000)


def test_key_values_logits_and_tensors_by_hand() -> None:
    # Keys and values of 10 layers, 4 wide, four bytes: 320 a token; four rows of 100 tokens, twice.
    assert kv_bytes(JOB) == 320
    assert part(JOB, "key-value").phases == (2 * 4 * 100 * 320, 0, 0, 0)
    # Of 200 tokens: 1,000 logits each of 16 bytes.
    assert part(JOB, "logits").update == 200 * 1000 * 16
    # Six rollouts of 100 tokens, 42 bytes each, on every process.
    assert part(JOB, "tensors").phases == (6 * 100 * 42,) * 4
    # A large batch is held 2^25 logits at a time.
    assert part(replace(JOB, micro_batch_tokens=10**6, questions=10**6), "logits").update == 2**25 * 16


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_keeps_what_is_counted(precision: str) -> None:
    """What autograd saves in a layer of a model twice as deep, beside the formula; 1024 tokens, GQA 2 : 1."""
    tokens = 1024
    found = saved_bytes(precision, 2, tokens) - saved_bytes(precision, 1, tokens)
    sized = read_shape(empty_model(small(2)))
    job = replace(JOB, shape=sized, precision=PRECISIONS[precision])
    copies = PRECISIONS[precision].compute * sized.layer_parameters if precision == "bf16-mixed" else 0
    assert found == pytest.approx(tokens * layer_bytes(job) + copies, rel=0.02)


def small(layers: int) -> Any:
    return config(64, layers, 4, 2, 176, 128, tied=True)


def saved_bytes(precision: str, layers: int, tokens: int) -> int:
    model: Any = AutoModelForCausalLM.from_config(small(layers))
    model = model.bfloat16() if precision == "bf16-true" else model
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    mixed = precision == "bf16-mixed"
    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if mixed else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    # 10 layers x 8 wide x four bytes, and two layers in work instead of eleven.
    layer = layer_bytes(JOB)
    assert part(JOB, "activations").update == 200 * 11 * layer
    assert part(replace(JOB, checkpointing=True), "activations").update == 200 * (320 + 2 * layer)


def test_vllm_has_its_share_and_room_for_so_many_rollouts() -> None:
    sampler = Sampler("vllm", dtype_bytes=2, memory_share=0.5)
    job = replace(JOB, gpu=replace(GPU, memory=16 * GIB), sampler=sampler, questions=1000)
    assert part(job, "vLLM").phases == (8 * GIB,) * 4
    assert part(replace(job, sampler=replace(sampler, sleeps=True)), "vLLM").phases == (8 * GIB, 0, 0, 0)
    # 8 GiB less 2 GiB of work and the weights; a rollout of 100 tokens takes 2 x 10 x 4 x 2 x 100 bytes = 16,000.
    assert rows_at_once(replace(job, assumed=replace(NOTHING, vllm_rows=10**9)), 100) == 3000
    assert rows_at_once(replace(job, sampler=replace(sampler, memory_share=0.1)), 100) == 0
    assert not fits(replace(job, sampler=replace(sampler, memory_share=0.1)))


def test_decoding_reads_weights_and_key_values_for_every_token() -> None:
    # Four bytes x 9,000 weights, four rows with 25 tokens on average of 320 bytes: 68,000 bytes at 500 a second; two
    # rounds of four rows for six rollouts, 20 tokens each.
    assert decode_seconds(JOB, rollouts=6, rows=4) == pytest.approx(68000 / 500 * 2 * 20)
    # With a memory that is fast, by arithmetic: 2 x 4 x 9,000 operations at half of 10^6.
    fast = replace(JOB, gpu=replace(GPU, bandwidth=1e12))
    assert decode_seconds(fast, rollouts=6, rows=4) == pytest.approx(72000 / 500000 * 2 * 20)
    # vLLM fills a row that has ended at once: 6 / 4 rounds.
    streamed = replace(fast, sampler=Sampler("vllm"))
    assert decode_seconds(streamed, rollouts=6, rows=4) == pytest.approx(72000 / 500000 * 1.5 * 20)


def test_reading_prompts_again_costs_every_turn() -> None:
    # A token: 2 x 1,000 parameters and 2 x 10 layers x 8 wide x 50 tokens of context = 10,000 operations.
    assert read_seconds(JOB, rollouts=4, rows=4) == pytest.approx(4 * 30 * 10000 / 500000)
    assert read_seconds(JOB, rollouts=6, rows=4) == pytest.approx(6 * 2 * 25 * 10000 / 500000)


def test_operations_of_the_passes_by_hand() -> None:
    # Six rollouts: 300 tokens of 10,000 operations; the output layer, 2 x 8,000, for 120 of them.
    body, head = 3_000_000, 1_920_000
    assert pass_flops(JOB, backward=False) == body + head
    # Backward is twice the forward pass, and the output layer is computed again.
    assert pass_flops(JOB, backward=True) == 3 * body + 4 * head
    assert pass_flops(replace(JOB, checkpointing=True), backward=True) == 4 * body + 4 * head
    assert pass_flops(replace(JOB, lora=True), backward=True) == 2 * body + 3 * head


def test_processes_divide_the_passes() -> None:
    one, four = (
        {item.name: item.seconds for item in step_times(replace(JOB, processes=n, questions=4))} for n in (1, 4)
    )
    assert four["gradients"] == pytest.approx(one["gradients"] / 4)
    assert "communication between processes" not in one
    # DDP sends the gradients of 9,000 parameters twice, 3/4 of them, at 70 % of 1,000 bytes a second.
    assert four["communication between processes"] == pytest.approx(4 * 0.75 * 2 * 9000 / 700)


def test_a_validation_asks_64_questions_at_a_time() -> None:
    job = replace(JOB, validation_questions=65, sampler=Sampler("transformers", batch_size=64))
    alone = replace(job, validation_questions=64)
    assert validation_seconds(job) == pytest.approx(2 * validation_seconds(alone))
    assert validation_seconds(JOB) == 0


@given(
    st.sampled_from([1, 8, 64]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(PRECISIONS.values())),
    st.floats(10e9, 200e9),
)
def test_advice_is_given_where_a_run_does_not_fit(
    processes: int, lora: bool, vllm: bool, precision: Precision, room: float
) -> None:
    job = replace(
        LARGE,
        trained=10**7 if lora else LARGE.trained,
        lora=lora,
        gpu=replace(GPU, memory=room),
        precision=precision,
        sampler=Sampler("vllm" if vllm else "transformers"),
        processes=processes,
    )
    words, changed = remedies(job)
    assert (words == []) == (changed == job)
    assert len(set(words)) == len(words)
    assert peak(changed) <= max(peak(job), room)
    if fits(job):
        assert words == []
        assert peak(job) <= room


def test_the_advice_for_a_3b_model_on_one_device_and_on_eight() -> None:
    """Weights, gradients and two averages take 16 bytes of each of 3.1e9 parameters, the optimizer 4 more: 58 GiB."""
    job = replace(LARGE, gpu=replace(GPU, memory=79 * GIB), sampler=Sampler("vllm"))
    assert not fits(job)
    assert not fits(replace(job, gpu=replace(GPU, memory=57 * GIB), sampler=Sampler("elsewhere"), checkpointing=True))
    words, changed = remedies(replace(job, processes=8))
    assert fits(changed)
    assert "--config cluster/fsdp" in words
    assert "--model.gradient_checkpointing true" in words


@pytest.fixture
def qwen_folder(tmp_path: Path) -> Path:
    QWEN_3B.save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


RECIPE = (
    *("--config", "cluster/qwen2_5_3b", "--config", "calibrators/calibadv", "--data.train", "train.jsonl"),
    *("--data.validation", "validation.jsonl", "--model.retriever.url", '["http://a:8000", "http://b:8000"]'),
)


def test_a_recipe_is_read_as_fit_reads_it(qwen_folder: Path) -> None:
    cli = PlanCLI([*RECIPE, "--model.policy", str(qwen_folder), "--model.group_size", "4", "--gpu_memory", "100"])
    job = read_job(cli.settings_of_fit, cli.options)
    assert (job.shape.parameters, job.processes, job.sharded) == (3_085_938_688, 8, True)
    assert (job.questions, job.group_size, job.rollouts, job.own_rollouts) == (512, 4, 2048, 256)
    assert (job.max_rollout_tokens, job.max_turns, job.mean_policy_tokens, job.mini_batches) == (4096, 5, 2500, 10)
    assert (job.sampler.kind, job.precision, job.checkpointing) == ("vllm", PRECISIONS["bf16-mixed"], True)
    assert job.gpu.memory == 100 * GIB
    assert (job.rollout_steps, job.validations, job.validation_questions) == (410, 42, 500)


def test_devices_are_counted_over_machines(qwen_folder: Path) -> None:
    more = ("--trainer.num_nodes", "2", "--trainer.strategy.data_parallel_size", "16")
    cli = PlanCLI([*RECIPE, "--model.policy", str(qwen_folder), *more])
    job = read_job(cli.settings_of_fit, cli.options)
    assert (job.processes, job.nodes, job.link) == (16, 2, 50e9)
    ddp = PlanCLI(["--config", "quickstart", "--config", "cluster/ddp"])
    job = read_job(ddp.settings_of_fit, ddp.options)
    assert (job.processes, job.sharded, job.bucket_view) == (8, False, True)


def test_the_plan_of_the_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--config", "quickstart", "--config", "calibrators/calibadv"]) == 0
    out = capsys.readouterr().out
    assert "349,632 parameters; 1 process, 32-true" in out
    assert "fits" in out
    assert "nothing was loaded or run" in out
    assert files(tmp_path) == {}


def test_a_plan_says_what_to_change(qwen_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = ("--trainer.devices", "1", "--trainer.strategy", "auto", "--model.gradient_checkpointing", "false")
    assert main(["plan", *RECIPE, "--model.policy", str(qwen_folder), *alone]) == 0
    out = capsys.readouterr().out
    assert "does not fit 79 GiB" in out
    assert "--model.gradient_checkpointing true" in out


def test_adapters_are_counted(qwen_folder: Path) -> None:
    """Rank 4 on every linear layer but the last: 4 x (in + out), for q, k, v, o, gate, up and down of 36 layers."""
    cli = PlanCLI([*RECIPE, "--model.policy", str(qwen_folder), "--model.lora", '{"rank": 4}'])
    job = read_job(cli.settings_of_fit, cli.options)
    q_and_o, k_and_v, wide = 2 * (2048 + 2048), 2 * (2048 + 256), 3 * (2048 + 11008)
    assert (job.trained, job.lora) == (36 * 4 * (q_and_o + k_and_v + wide), True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu_memory", "0"), "--gpu_memory is 0.0; it must be above 0"),
        (("--mfu", "1.5"), "--mfu is 1.5; it is a share of the peak rate, at most 1"),
        (("--gpu", "abacus"), "'abacus' is not accepted"),
        (("--model.policy", "nowhere"), "model.policy 'nowhere' is not a folder"),
        (("--trainer.devices", "3"), "data.questions_per_step is 16 and there are 3 processes"),
        (("--config", "cluster/fsdp", "--trainer.devices", "4"), "give --trainer.strategy.data_parallel_size 4"),
        (
            ("--config", "engines/vllm", "--model.engine.max_model_len", "100"),
            "model.engine.max_model_len is 100 and protocol.max_rollout_tokens is 512; raise",
        ),
        (
            ("--config", "engines/vllm", "--model.engine.tensor_parallel_size", "2", "--trainer.devices", "4"),
            "tensor_parallel_size is 2 and 4 processes train; give 1",
        ),
        (("--rollout_tokens", "600"), "--rollout_tokens is 600 and protocol.max_rollout_tokens is 512"),
        (("--rollout_tokens", "300", "--policy_tokens", "301"), "--policy_tokens is 301 and a rollout has 300; lower"),
        (("--trainer.precision", "16-mixed"), "trainer.precision is 16-mixed"),
        (("--trainer.precision", "64-true"), "plan knows 32-true, bf16-mixed, bf16-true"),
        (("--model.group_siz", "3"), "option --model.group_siz is not accepted; did you mean --model.group_size?"),
        (("--model.lora", '{"target_modules": ["abacus"]}'), "model.lora.target_modules is ['abacus']"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "quickstart", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
