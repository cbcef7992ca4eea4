"""Memory of one device, part by part, in the four phases of a rollout step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from calibadv.planning.job import GIB, PRECISIONS, Job
from calibadv.policy.logprobs import LOGITS_AT_ONCE

PHASES = ("rollout", "logprobs", "update", "optimizer")
# What vLLM needs beside weights and cache: activations of a step and CUDA graphs.
_VLLM_WORK = 2 * GIB


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one device that one thing takes, by phase."""

    name: str
    rollout: float = 0.0
    logprobs: float = 0.0
    update: float = 0.0
    optimizer: float = 0.0

    @property
    def phases(self) -> tuple[float, float, float, float]:
        """Bytes in the order of ``PHASES``."""
        return self.rollout, self.logprobs, self.update, self.optimizer


def _always(name: str, size: float) -> Part:
    return Part(name, size, size, size, size)


def memory(job: Job) -> list[Part]:
    """Estimate what a device holds.

    Gradients stay until the next update begins, and the optimizer's averages from the first update on, so that both are
    there while rollouts are sampled.
    """
    parts = [*_parameters(job), *_gathered(job), *_sampling(job), *_passes(job)]
    tensors = job.rollouts * job.limit * job.assumed.tensor_bytes
    parts += [_always("tensors of all rollouts", tensors), _always("CUDA, NCCL, fragments", job.assumed.reserve)]
    return [part for part in parts if any(part.phases)]


def peak(job: Job) -> float:
    """The most bytes that a device holds."""
    return max(map(sum, zip(*(part.phases for part in memory(job)), strict=True)))


def _parameters(job: Job) -> Iterator[Part]:
    """AdamW keeps two averages of each trained parameter, in the dtype of the parameter; adapters stay in float32."""
    size, shape = job.precision.weights, job.shape
    adapters, trained = (4 * job.trained, 4 * job.trained) if job.lora else (0, size * job.trained)
    yield _always("weights", (size * shape.parameters + adapters) / job.shards)
    yield _always("gradients", trained / job.shards)
    yield _always("optimizer (AdamW)", 2 * trained / job.shards)
    # torch.optim's foreach implementation holds one more tensor per parameter while it steps.
    yield Part("optimizer's work space", optimizer=trained / job.shards)
    if job.processes > 1 and not job.sharded and not job.bucket_view:
        yield _always("gradient buckets (DDP)", trained)
    if job.reference:
        yield _always("reference", size * shape.parameters / job.shards)


def _gathered(job: Job) -> Iterator[Part]:
    """What a pass holds beyond its shard (FSDP2), and what autocast converts.

    A layer is gathered while the one before it is computed; what is outside of the layers stays to the end of the pass.
    """
    size, shape = job.precision.weights, job.shape
    if job.sharded:
        whole = size * (shape.outer_parameters + 2 * shape.layer_parameters)
        trained = 0 if job.lora else size * (shape.outer_parameters + shape.layer_parameters)
        yield Part("gathered parameters (FSDP2)", logprobs=whole, update=whole + trained)
    if job.precision.compute < size:
        some = job.precision.compute * (shape.head_parameters + 2 * shape.layer_parameters)
        kept = job.precision.compute * (shape.head_parameters + shape.body_parameters)
        sampled = kept if job.sampler.kind == "transformers" else 0.0
        yield Part("bfloat16 copies (autocast)", sampled, some, some if job.checkpointing else kept)


def kv_bytes(job: Job) -> float:
    """Bytes of keys and values of one token, on one device."""
    sampler, shape = job.sampler, job.shape
    if sampler.kind == "vllm":
        return 2 * shape.layers * shape.kv_width * sampler.dtype_bytes / sampler.tensor_parallel
    return shape.layers * shape.kv_width * (job.precision.keys + job.precision.compute)


def engine_weights(job: Job) -> float:
    """Bytes of the weights that are read for every decoded token."""
    size = job.sampler.dtype_bytes if job.sampler.kind == "vllm" else job.precision.compute
    return size * job.shape.parameters / job.sampler.tensor_parallel


def vllm_memory(job: Job) -> float:
    """Bytes that vLLM takes of a device while it samples."""
    if job.sampler.kv_cache is not None:
        return engine_weights(job) + job.sampler.kv_cache + _VLLM_WORK
    return job.sampler.memory_share * job.gpu.memory


def rows_at_once(job: Job, tokens: int) -> int:
    """How many rollouts of one process are decoded together."""
    if job.sampler.kind == "vllm":
        cache = vllm_memory(job) - engine_weights(job) - _VLLM_WORK
        room = int(max(0.0, cache) // (tokens * kv_bytes(job)))
        return min(job.assumed.vllm_rows, room, job.own_rollouts)
    return min(job.sampler.batch_size, job.own_rollouts)


def _sampling(job: Job) -> Iterator[Part]:
    """Share of vLLM, or what the transformers engine adds to the model: a cache, and the reading of what is new."""
    shape, precision = job.shape, job.precision
    if job.sampler.kind == "vllm":
        name, size = "vLLM: weights and cache", vllm_memory(job)
        yield Part(name, rollout=size) if job.sampler.sleeps else _always(name, size)
    if job.sampler.kind != "transformers":
        return
    if job.sharded:
        yield _always("whole copy to sample from", precision.weights * shape.parameters)
    rows = rows_at_once(job, job.limit)
    # While rollouts go from one turn to the next there are two copies of what they have read.
    yield Part("key-value cache", rollout=2 * rows * job.limit * kv_bytes(job))
    new = (job.tokens - job.policy_tokens) / job.turns
    alive = 2 * precision.stream * shape.hidden + 3 * precision.compute * shape.intermediate
    masks = precision.compute * job.limit
    yield Part("reading observations", rollout=rows * new * (alive + masks))


def layer_bytes(job: Job) -> float:
    """Bytes that one layer keeps per token for its backward pass.

    The method is that of Korthikanti et al. (arXiv 2205.05198): count what each operation saves. For a layer with RMS
    norms, rotary angles, grouped attention without a stored score matrix and a gated feed-forward part, that is: two
    norms with the inputs of what follows (``kept_per_hidden`` x H), rotated queries and keys, values and the output of
    the attention (2 Q + 2 KV), and gate, its activation, up and their product (4 I).
    """
    shape, size = job.shape, job.precision.compute
    attention = size * 2 * (shape.query_width + shape.kv_width)
    return job.precision.kept_per_hidden * shape.hidden + attention + 4 * size * shape.intermediate


def _passes(job: Job) -> Iterator[Part]:
    """Of a micro-batch. One layer more than is kept stands for the gradients of the layer in work."""
    layers, tokens = job.shape.layers, job.micro_tokens
    layer = layer_bytes(job)
    inputs = layers * job.precision.stream * job.shape.hidden
    kept = inputs + 2 * layer if job.checkpointing else (layers + 1) * layer
    yield Part("activations of a micro-batch", logprobs=tokens * layer, update=tokens * kept)
    logits = job.assumed.logit_bytes * min(tokens * job.shape.vocabulary, max(job.shape.vocabulary, LOGITS_AT_ONCE))
    yield Part("logits at a time", logprobs=logits, update=logits)


def fits(job: Job) -> bool:
    """Whether the run fits its devices, by this estimate."""
    return peak(job) <= job.gpu.memory and rows_at_once(job, job.limit) > 0


def remedies(job: Job) -> tuple[list[str], Job]:
    """Find what to change so that a run fits: again and again what helps most."""
    chosen: list[str] = []
    while not fits(job):
        changes = [(words, changed) for words, changed in _changes(job) if _excess(changed) < _excess(job)]
        if not changes:
            break
        words, job = min(changes, key=lambda change: _excess(change[1]))
        chosen.append(words)
    return chosen, job


def _excess(job: Job) -> float:
    """How far a run is from fitting; an amount of memory that is within the limits does not count."""
    lacking = 0.0 if rows_at_once(job, job.limit) else engine_weights(job) + _VLLM_WORK + job.limit * kv_bytes(job)
    return max(0.0, peak(job) - job.gpu.memory) + lacking


def _changes(job: Job) -> Iterator[tuple[str, Job]]:
    sampler = job.sampler
    yield "--model.gradient_checkpointing true", replace(job, checkpointing=True)
    yield f"--model.micro_batch_tokens {job.limit}", replace(job, micro_batch_tokens=job.limit)
    if job.precision.compute == 4:
        yield "--trainer.precision bf16-mixed", replace(job, precision=PRECISIONS["bf16-mixed"])
    if job.processes > 1:
        yield "--config cluster/fsdp", replace(job, sharded=True)
    if sampler.kind == "transformers":
        yield "--model.engine.batch_size 64", replace(job, sampler=replace(sampler, batch_size=64))
    if sampler.kind == "vllm":
        yield "--model.engine.sleep true", replace(job, sampler=replace(sampler, sleeps=True))
        for share in (0.2, 0.3, 0.5, 0.6, 0.8):
            other = replace(sampler, memory_share=share, kv_cache=None)
            yield f"--model.engine.gpu_memory_utilization {share}", replace(job, sampler=other)
