"""The description of a run for an estimate: devices, precision, sampler, sizes and assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from calibadv.planning.model_shape import ModelShape

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator, by its vendor's data sheet (dense rates, without sparsity).

    Attributes:
        memory: bytes that a process can use.
        tflops: 10^12 operations per second in bfloat16.
        tflops32: the same in float32, without TF32, which torch does not use by default.
        bandwidth: bytes per second of its memory.
        link: bytes per second that it sends to its neighbours in the machine.
    """

    memory: float
    tflops: float
    tflops32: float
    bandwidth: float
    link: float


GPUS = {
    "a100": Gpu(79 * GIB, 312, 19.5, 2.039e12, 300e9),
    "h100": Gpu(79 * GIB, 989, 67, 3.35e12, 450e9),
    "h200": Gpu(140 * GIB, 989, 67, 4.8e12, 450e9),
    "l40s": Gpu(44 * GIB, 362, 91.6, 0.864e12, 32e9),
}


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes per number, by the tensor that holds it, and what a layer keeps for its backward pass.

    Attributes:
        weights: of stored weights, gradients and the optimizer's two averages.
        compute: of a factor in a matrix product.
        stream: of the hidden states between two layers.
        keys: of a rotated key in the cache of the transformers engine.
        kept_per_hidden: bytes per token and unit of hidden width that the norms and matrix products of a layer keep.
    """

    weights: int
    compute: int
    stream: int
    keys: int
    kept_per_hidden: int


PRECISIONS = {
    "32-true": Precision(4, 4, 4, 4, 24),
    # Under autocast, weights, states and rotary angles stay float32, and each of q, k, v, gate and up keeps its own
    # bfloat16 copy of its input.
    "bf16-mixed": Precision(4, 2, 4, 4, 26),
    "bf16-true": Precision(2, 2, 2, 2, 16),
}


@dataclass(frozen=True, slots=True)
class Sampler:
    """The sampling engine.

    Attributes:
        kind: the trainer's own model, vLLM inside the process, or a service elsewhere.
        batch_size: rollouts decoded together, of the transformers engine.
        dtype_bytes: of a number in vLLM's copy.
        memory_share: of the device, for vLLM.
        kv_cache: bytes of vLLM's cache in place of the share.
        sleeps: vLLM frees its memory between rollouts.
        tensor_parallel: devices over which vLLM spreads a layer.
    """

    kind: Literal["transformers", "vllm", "elsewhere"]
    batch_size: int = 256
    dtype_bytes: int = 2
    memory_share: float = 0.4
    kv_cache: float | None = None
    sleeps: bool = False
    tensor_parallel: int = 1


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Assumed rates and sizes, which no config holds.

    Attributes:
        mfu: share of the peak rate that passes through the model reach (model FLOP utilisation).
        bandwidth_share: share of the memory's bandwidth that decoding reaches.
        launch_seconds: per layer and decoded token, of the transformers engine, which starts kernels from Python.
        link_share: share of the link's rate that collectives reach.
        network: bytes per second that one device sends to other machines (400 Gb/s each).
        vllm_rows: maximum number of requests that vLLM decodes together.
        reserve: bytes of a device for CUDA, NCCL and fragments.
        logit_bytes: of one logit with its softmax, logarithm and gradients, at the peak.
        tensor_bytes: of one token in all tensors [B, T] of a step together.
    """

    mfu: float = 0.4
    bandwidth_share: float = 0.6
    launch_seconds: float = 1e-3
    link_share: float = 0.7
    network: float = 50e9
    vllm_rows: int = 256
    reserve: float = 2 * GIB
    logit_bytes: int = 16
    tensor_bytes: int = 42


@dataclass(frozen=True, slots=True)
class Job:
    """A run: its model, its devices and its settings.

    Attributes:
        shape: of the policy.
        trained: parameters that are trained: all, or those of the adapters.
        gpu: each device.
        precision: of the trainer.
        sampler: the engine.
        lora: adapters are trained.
        holds_reference: a frozen copy of the policy is kept (KL coefficient above 0, no adapters).
        runs_reference: a reference computes log-probabilities (KL coefficient above 0).
        processes: one per device, over all machines.
        nodes: machines.
        sharded: FSDP2; otherwise several processes use DDP.
        bucket_view: DDP's gradients are views of its buckets.
        checkpointing: activations are recomputed in the backward pass.
        questions: per rollout step.
        group_size: rollouts per question.
        mini_batches: optimizer steps per rollout step.
        micro_batch_tokens: maximum tokens of a forward pass.
        max_rollout_tokens: maximum length of a rollout.
        mean_rollout_tokens: mean length of a rollout.
        mean_policy_tokens: mean number of tokens of a rollout that the policy writes.
        max_turns: maximum number of messages of a rollout.
        rollout_steps: of the run.
        validations: of the run.
        validation_questions: per validation.
        assumed: rates and sizes that no config holds.
    """

    shape: ModelShape
    trained: int
    gpu: Gpu
    precision: Precision
    sampler: Sampler
    questions: int
    group_size: int
    max_rollout_tokens: int
    mean_rollout_tokens: int
    mean_policy_tokens: int
    max_turns: int
    lora: bool = False
    holds_reference: bool = False
    runs_reference: bool = False
    processes: int = 1
    nodes: int = 1
    sharded: bool = False
    bucket_view: bool = False
    checkpointing: bool = False
    mini_batches: int = 1
    micro_batch_tokens: int = 16384
    rollout_steps: int = 1
    validations: int = 0
    validation_questions: int = 0
    assumed: Assumptions = field(default_factory=Assumptions)

    @property
    def rollouts(self) -> int:
        """Rollouts of a step, over all processes."""
        return self.questions * self.group_size

    @property
    def own_rollouts(self) -> int:
        """Rollouts of a step, of one process."""
        return math.ceil(self.questions / self.processes) * self.group_size

    @property
    def shards(self) -> int:
        """Number of shards of the parameters."""
        return self.processes if self.sharded else 1

    @property
    def micro_tokens(self) -> int:
        """Maximum tokens of one forward pass: the budget, but at least the longest rollout."""
        share = math.ceil(self.rollouts * self.max_rollout_tokens / self.mini_batches / self.processes)
        return max(self.max_rollout_tokens, min(self.micro_batch_tokens, share))

    @property
    def peak_flops(self) -> float:
        """FLOP per second of a device in the precision of its matrix products."""
        return 1e12 * (self.gpu.tflops if self.precision.compute == 2 else self.gpu.tflops32)

    @property
    def link(self) -> float:
        """Bytes per second that a device sends; with several machines, over the network."""
        return self.gpu.link if self.nodes == 1 else min(self.gpu.link, self.assumed.network)
