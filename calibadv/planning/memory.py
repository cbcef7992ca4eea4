"""Memory of one device in the four phases of a rollout step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from calibadv.planning.job import GIB, PRECISIONS, Job
from calibadv.policy.logprobs import LOGITS_AT_ONCE

PHASES = ("rollout", "logprobs", "update", "optimizer")
# Beside weights and cache, vLLM holds activations of a step and CUDA graphs.
_VLLM_OVERHEAD = 2 * GIB


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """Bytes of one device that one kind of tensors takes, by phase."""

    name: str
    rollout: float = 0.0
    logprobs: float = 0.0
    update: float = 0.0
    optimizer: float = 0.0

    @property
    def phases(self) -> tuple[float, float, float, float]:
        """Bytes in the order of ``PHASES``."""
        return self.rollout, self.logprobs, self.update, self.optimizer


def _constant(name: str, size: float) -> MemoryItem:
    return MemoryItem(name, size, size, size, size)


def memory_items(job: Job) -> list[MemoryItem]:
    """Estimate the memory of a device.

    Gradients stay until the next update begins, and the optimizer's averages from the first update on, so that both
    take memory while rollouts are sampled.
    """
    items = [*_parameters(job), *_pass_copies(job), *_sampling(job), *_passes(job)]
    tensors = job.rollouts * job.max_rollout_tokens * job.assumed.tensor_bytes
    items += [_constant("tensors of all rollouts", tensors), _constant("CUDA, NCCL, fragments", job.assumed.reserve)]
    return [item for item in items if any(item.phases)]


def peak(job: Job) -> float:
    """Maximum bytes of a device over the phases."""
    return max(map(sum, zip(*(item.phases for item in memory_items(job)), strict=True)))


def _parameters(job: Job) -> Iterator[MemoryItem]:
    """AdamW keeps two averages of each trained parameter, in the dtype of the parameter; adapters stay in float32."""
    size, shape = job.precision.weights, job.shape
    adapters, trained = (4 * job.trained, 4 * job.trained) if job.lora else (0, size * job.trained)
    yield _constant("weights", (size * shape.parameters + adapters) / job.shards)
    yield _constant("gradients", trained / job.shards)
    yield _constant("optimizer (AdamW)", 2 * trained / job.shards)
    # torch.optim's foreach implementation holds one more tensor per parameter while it steps.
    yield MemoryItem("optimizer's work space", optimizer=trained / job.shards)
    if job.processes > 1 and not job.sharded and not job.bucket_view:
        yield _constant("gradient buckets (DDP)", trained)
    if job.holds_reference:
        yield _constant("reference", size * shape.parameters / job.shards)


def _pass_copies(job: Job) -> Iterator[MemoryItem]:
    """Copies of parameters that last for a pass: gathered ones (FSDP2), and those that autocast converts.

    A layer is gathered while the one before it is computed; parameters outside of the layers stay gathered to the end
    of the pass.
    """
    size, shape = job.precision.weights, job.shape
    if job.sharded:
        whole = size * (shape.outer_parameters + 2 * shape.layer_parameters)
        trained = 0 if job.lora else size * (shape.outer_parameters + shape.layer_parameters)
        yield MemoryItem("gathered parameters (FSDP2)", logprobs=whole, update=whole + trained)
    if job.precision.compute < size:
        layerwise = job.precision.compute * (shape.head_parameters + 2 * shape.layer_parameters)
        kept = job.precision.compute * (shape.head_parameters + shape.body_parameters)
        sampled = kept if job.sampler.kind == "transformers" else 0.0
        yield MemoryItem("bfloat16 copies (autocast)", sampled, layerwise, layerwise if job.checkpointing else kept)


def kv_bytes(job: Job) -> float:
    """Bytes of the keys and values of one token, on one device."""
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
        return engine_weights(job) + job.sampler.kv_cache + _VLLM_OVERHEAD
    return job.sampler.memory_share * job.gpu.memory


def rows_at_once(job: Job, tokens: int) -> int:
    """Number of rollouts that one process decodes together."""
    if job.sampler.kind == "vllm":
        cache = vllm_memory(job) - engine_weights(job) - _VLLM_OVERHEAD
        room = int(max(0.0, cache) // (tokens * kv_bytes(job)))
        return min(job.assumed.vllm_rows, room, job.own_rollouts)
    return min(job.sampler.batch_size, job.own_rollouts)


def _sampling(job: Job) -> Iterator[MemoryItem]:
    """Memory of vLLM, or the key-value cache and the prefill activations of the transformers engine."""
    shape, precision = job.shape, job.precision
    if job.sampler.kind == "vllm":
        name, size = "vLLM: weights and cache", vllm_memory(job)
        yield MemoryItem(name, rollout=size) if job.sampler.sleeps else _constant(name, size)
    if job.sampler.kind != "transformers":
        return
    if job.sharded:
        yield _constant("whole copy to sample from", precision.weights * shape.parameters)
    rows = rows_at_once(job, job.max_rollout_tokens)
    # Between two turns of the rollouts there are two copies of the cache.
    yield MemoryItem("key-value cache", rollout=2 * rows * job.max_rollout_tokens * kv_bytes(job))
    new = (job.mean_rollout_tokens - job.mean_policy_tokens) / job.max_turns
    alive = 2 * precision.stream * shape.hidden + 3 * precision.compute * shape.intermediate
    masks = precision.compute * job.max_rollout_tokens
    yield MemoryItem("reading observations", rollout=rows * new * (alive + masks))


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


def _passes(job: Job) -> Iterator[MemoryItem]:
    """Activations of a micro-batch; one extra layer accounts for the gradients of the layer that is being computed."""
    layers, tokens = job.shape.layers, job.micro_tokens
    layer = layer_bytes(job)
    inputs = layers * job.precision.stream * job.shape.hidden
    kept = inputs + 2 * layer if job.checkpointing else (layers + 1) * layer
    yield MemoryItem("activations of a micro-batch", logprobs=tokens * layer, update=tokens * kept)
    logits = job.assumed.logit_bytes * min(tokens * job.shape.vocabulary, max(job.shape.vocabulary, LOGITS_AT_ONCE))
    yield MemoryItem("logits at a time", logprobs=logits, update=logits)


def fits(job: Job) -> bool:
    """Check that the run fits its devices, by this estimate."""
    return peak(job) <= job.gpu.memory and rows_at_once(job, job.max_rollout_tokens) > 0


def remedies(job: Job) -> tuple[list[str], Job]:
    """Choose options that make a run fit, greedily by the memory that they save; return them and the changed run."""
    chosen: list[str] = []
    while not fits(job):
        changes = [(words, changed) for words, changed in _changes(job) if _excess(changed) < _excess(job)]
        if not changes:
            break
        words, job = min(changes, key=lambda change: _excess(change[1]))
        chosen.append(words)
    return chosen, job


def _excess(job: Job) -> float:
    """Bytes that a run lacks; 0 if it fits."""
    lacking = max(0.0, peak(job) - job.gpu.memory)
    if rows_at_once(job, job.max_rollout_tokens):
        return lacking
    return lacking + engine_weights(job) + _VLLM_OVERHEAD + job.max_rollout_tokens * kv_bytes(job)


def _changes(job: Job) -> Iterator[tuple[str, Job]]:
    sampler = job.sampler
    yield "--model.gradient_checkpointing true", replace(job, checkpointing=True)
    yield (
        f"--model.micro_batch_tokens {job.max_rollout_tokens}",
        replace(job, micro_batch_tokens=job.max_rollout_tokens),
    )
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
