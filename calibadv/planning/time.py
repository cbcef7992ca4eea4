"""Seconds of a rollout step, from peak rates and assumed shares of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from calibadv.data.datamodule import EVALUATION_BATCH
from calibadv.planning.job import Job
from calibadv.planning.memory import engine_weights, kv_bytes, rows_at_once


@dataclass(frozen=True, slots=True)
class TimeItem:
    """Seconds of one part of a rollout step, and the stage of the run's timer that they belong to."""

    name: str
    stage: str
    seconds: float


def forward_flops(job: Job, tokens: float, context: float) -> float:
    """FLOP of a forward pass through the layers, without the output layer.

    2 per parameter and token, and for causal attention 2 x layers x query width x context per token: half of the full
    score matrix, twice, for scores and values (PaLM's appendix B, arXiv 2204.02311, without its factor for the
    backward pass).
    """
    shape = job.shape
    return tokens * (2 * shape.body_parameters + 2 * shape.layers * shape.query_width * context)


def pass_flops(job: Job, backward: bool) -> float:
    """FLOP of one pass over all rollouts, of all processes together.

    The output layer is applied to the policy's tokens only. A backward pass costs two forward passes, one of them
    for the gradients of the weights, which with adapters costs next to nothing. Checkpointing adds a forward pass, and
    the output layer is recomputed in any case.
    """
    body = forward_flops(job, job.rollouts * job.mean_rollout_tokens, job.mean_rollout_tokens)
    head = 2.0 * job.rollouts * job.mean_policy_tokens * job.shape.head_parameters
    if not backward:
        return body + head
    gradients = 1 if job.lora else 2
    return body * (1 + gradients + job.checkpointing) + head * (2 + gradients)


def decode_seconds(job: Job, rollouts: int, rows: int) -> float:
    """Seconds that one process takes to decode the policy's tokens of some rollouts.

    A decoded token of each of ``rows`` reads all weights once and the keys and values of each row; or, with many rows,
    takes 2 operations per parameter and row (Pope et al., arXiv 2211.05102).
    """
    read = engine_weights(job) + rows * job.mean_rollout_tokens / 2 * kv_bytes(job)
    by_memory = read / (job.gpu.bandwidth * job.assumed.bandwidth_share)
    rate = 1e12 * job.gpu.tflops if job.sampler.kind == "vllm" else job.peak_flops
    operations = 2 * rows * (job.shape.body_parameters + job.shape.head_parameters) / job.sampler.tensor_parallel
    one = max(by_memory, operations / (rate * job.assumed.mfu))
    if job.sampler.kind == "transformers":  # a batch ends with its longest rollout
        return (one + job.assumed.launch_seconds * job.shape.layers) * ceil(rollouts / rows) * job.mean_policy_tokens
    return one * rollouts / rows * job.mean_policy_tokens


def read_seconds(job: Job, rollouts: int, rows: int) -> float:
    """Seconds that one process takes to prefill the prompts and observations of some rollouts."""
    again = job.sampler.kind == "transformers" and rollouts > rows
    tokens = job.max_turns * job.mean_rollout_tokens / 2 if again else job.mean_rollout_tokens - job.mean_policy_tokens
    rate = 1e12 * job.gpu.tflops if job.sampler.kind == "vllm" else job.peak_flops
    flops = forward_flops(job, rollouts * tokens, job.mean_rollout_tokens) / job.sampler.tensor_parallel
    return flops / (rate * job.assumed.mfu)


def step_times(job: Job) -> list[TimeItem]:
    """Estimate the parts of a rollout step."""
    rate = job.peak_flops * job.assumed.mfu * job.processes
    items = list(_sampling(job, job.own_rollouts))
    items.append(TimeItem("log-probabilities of the policy", "logprobs", pass_flops(job, backward=False) / rate))
    if job.runs_reference:
        items.append(TimeItem("log-probabilities of the reference", "logprobs", pass_flops(job, backward=False) / rate))
    items.append(TimeItem("gradients", "update", pass_flops(job, backward=True) / rate))
    # AdamW reads weight, gradient and two averages, and writes all but the gradient.
    touched = 7 * job.precision.weights * job.trained / job.shards * job.mini_batches
    items.append(TimeItem("optimizer", "update", touched / (job.gpu.bandwidth * job.assumed.bandwidth_share)))
    items.append(TimeItem("communication between processes", "update", _communication(job)))
    return [item for item in items if item.seconds]


def validation_seconds(job: Job) -> float:
    """Estimate one validation: 64 questions at a time, greedily, over all processes."""
    blocks = ceil(job.validation_questions / EVALUATION_BATCH)
    rollouts = ceil(min(EVALUATION_BATCH, job.validation_questions) / job.processes)
    return blocks * sum(item.seconds for item in _sampling(job, rollouts))


def _sampling(job: Job, rollouts: int) -> Iterator[TimeItem]:
    rows = min(rows_at_once(job, job.mean_rollout_tokens), rollouts)
    if job.sampler.kind != "elsewhere" and rows:
        yield TimeItem("decoding", "rollout", decode_seconds(job, rollouts, rows))
        yield TimeItem("reading prompts and observations", "rollout", read_seconds(job, rollouts, rows))


def _communication(job: Job) -> float:
    """Seconds of communication, without overlap with computation.

    FSDP2 gathers all parameters for each pass of each micro-batch and again in the backward pass, and scatters the
    gradients; the copy of the engine gathers them once. DDP's ring all-reduce sends gradients twice per mini-batch.
    """
    if job.processes == 1:
        return 0.0
    size, share = job.precision.weights, (job.processes - 1) / job.processes
    if job.sharded:
        passes = max(1.0, job.rollouts * job.mean_rollout_tokens / job.micro_tokens / job.processes)
        trained = 1 + job.runs_reference + 2
        sent = passes * trained * job.shape.parameters + passes * job.trained + job.shape.parameters
    else:
        sent = 2.0 * job.mini_batches * job.trained
    return size * share * sent / (job.link * job.assumed.link_share)
