"""The description of a run for an estimate: devices, precision, sampler, sizes and assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from calibadv.planning.model_shape import ModelShape

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator, by its vendor's data sheet (dense rates, without sparsity)."""

    memory: float  # bytes that a process can use
    tflops: float  # 10^12 operations per second in bfloat16
    tflops32: float  # the same in float32, without TF32, which torch does not use by default
    bandwidth: float  # bytes per second of its memory
    link: float  # bytes per second that it sends to its neighbours in the machine


GPUS = {
    "a100": Gpu(79 * GIB, 312, 19.5, 2.039e12, 300e9),
    "h100": Gpu(79 * GIB, 989, 67, 3.35e12, 450e9),
    "h200": Gpu(140 * GIB, 989, 67, 4.8e12, 450e9),
    "l40s": Gpu(44 * GIB, 362, 91.6, 0.864e12, 32e9),
}


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes per number, by the tensor that holds it, and what a layer keeps for its backward pass."""

    weights: int  # of stored weights, gradients and the optimizer's two averages
    compute: int  # of a factor in a matrix product
    stream: int  # of the hidden states between two layers
    keys: int  # of a rotated key in the cache of the transformers engine
    kept_per_hidden: int  # bytes per token and unit of hidden width that the norms and matrix products of a layer keep


PRECISIONS = {
    "32-true": Precision(4, 4, 4, 4, 24),
    # Under autocast, weights, states and rotary angles stay float32, and each of q, k, v, gate and up keeps its own
    # bfloat16 copy of its input.
    "bf16-mixed": Precision(4, 2, 4, 4, 26),
    "bf16-true": Precision(2, 2, 2, 2, 16),
}


@dataclass(frozen=True, slots=True)
class Sampler:
    """The sampling engine."""

    kind: Literal["transformers", "vllm", "elsewhere"]  # the trainer's own model, vLLM in the process, or a service
    batch_size: int = 256  # rollouts decoded together, of the transformers engine
    dtype_bytes: int = 2  # of a number in vLLM's copy
    memory_share: float = 0.4  # of the device, for vLLM
    kv_cache: float | None = None  # bytes of vLLM's cache in place of the share
    sleeps: bool = False  # vLLM frees its memory between rollouts
    tensor_parallel: int = 1  # devices over which vLLM spreads a layer


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Assumed rates and sizes, which no config holds."""

    mfu: float = 0.4  # share of the peak rate that passes through the model reach (model FLOP utilisation)
    bandwidth_share: float = 0.6  # share of the memory's bandwidth that decoding reaches
    launch_seconds: float = 1e-3  # per layer and decoded token, of the transformers engine: kernels start from Python
    link_share: float = 0.7  # share of the link's rate that collectives reach
    network: float = 50e9  # bytes per second that one device sends to other machines (400 Gb/s each)
    vllm_rows: int = 256  # maximum number of requests that vLLM decodes together
    reserve: float = 2 * GIB  # bytes of a device for CUDA, NCCL and fragments
    logit_bytes: int = 16  # of one logit with its softmax, logarithm and gradients, at the peak
    tensor_bytes: int = 42  # of one token in all tensors [B, T] of a step together


@dataclass(frozen=True, slots=True)
class Job:
    """A run: its model, its devices and its settings."""

    shape: ModelShape
    trained: int  # parameters that are trained: all, or those of the adapters
    gpu: Gpu
    precision: Precision
    sampler: Sampler
    questions: int  # per rollout step
    group_size: int
    max_rollout_tokens: int
    mean_rollout_tokens: int
    mean_policy_tokens: int  # of a rollout
    max_turns: int  # maximum number of messages of a rollout
    lora: bool = False  # adapters are trained
    holds_reference: bool = False  # a frozen copy of the policy is kept (KL coefficient above 0, no adapters)
    runs_reference: bool = False  # a reference computes log-probabilities (KL coefficient above 0)
    processes: int = 1  # one per device, over all machines
    nodes: int = 1
    sharded: bool = False  # FSDP2; otherwise several processes use DDP
    bucket_view: bool = False  # DDP's gradients are views of its buckets
    checkpointing: bool = False  # activations are recomputed in the backward pass
    mini_batches: int = 1  # optimizer steps per rollout step
    micro_batch_tokens: int = 16384  # maximum tokens of a forward pass
    rollout_steps: int = 1
    validations: int = 0
    validation_questions: int = 0  # per validation
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
