"""What is known of a run before it starts, and what is assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from calibadv.planning.model_shape import ModelShape

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator, by its maker's data sheet (dense rates, without sparsity).

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
    """Bytes of a number at each place where one lies, and of what a layer keeps for its backward pass.

    Attributes:
        weights: of stored weights, gradients and the optimizer's two averages.
        compute: of a factor in a matrix product.
        stream: of the states between two layers.
        keys: of a rotated key in the cache of the transformers engine.
        kept_per_hidden: bytes that the two norms of a layer and its matrix products keep per token and hidden width.
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
    """How tokens are sampled.

    Attributes:
        kind: in the trainer's own model, in vLLM inside the process, or elsewhere.
        batch_size: rollouts decoded together, of the transformers engine.
        dtype_bytes: of a number in vLLM's copy.
        memory_share: of the device, for vLLM.
        kv_cache: bytes of vLLM's cache in place of the share.
        sleeps: whether vLLM leaves the device between rollouts.
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
    """What no config says.

    Attributes:
        mfu: share of the peak rate that passes through the model reach (model FLOP utilisation).
        bandwidth_share: share of the memory's bandwidth that decoding reaches.
        launch_seconds: per layer and decoded token, of the transformers engine, which starts kernels from Python.
        link_share: share of the link's rate that collectives reach.
        network: bytes per second that one device sends to other machines (400 Gb/s each).
        vllm_rows: requests that vLLM decodes together at most.
        reserve: bytes of a device for CUDA, NCCL and fragments.
        logit_bytes: of one logit, its softmax, its logarithm and their gradients, at the peak.
        tensor_bytes: of one token of one rollout in all tensors [B, T] of a step.
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
        lora: whether adapters are trained.
        reference: whether a frozen copy is kept (KL coefficient above 0, no adapters).
        compared: whether a reference is run (KL coefficient above 0).
        processes: one per device, over all machines.
        nodes: machines.
        sharded: FSDP2; otherwise several processes are DDP.
        bucket_view: whether DDP's gradients lie in its buckets.
        checkpointing: whether activations are computed again.
        questions: of a rollout step.
        group_size: rollouts per question.
        mini_batches: optimizer steps per rollout step.
        micro_batch_tokens: the budget of a forward pass.
        limit: the most tokens of a rollout.
        tokens: mean tokens of a rollout.
        policy_tokens: mean tokens of a rollout that the policy writes.
        turns: the most messages of a rollout.
        rollout_steps: of the run.
        validations: of the run.
        validation_questions: of one validation.
        assumed: everything else.
    """

    shape: ModelShape
    trained: int
    gpu: Gpu
    precision: Precision
    sampler: Sampler
    questions: int
    group_size: int
    limit: int
    tokens: int
    policy_tokens: int
    turns: int
    lora: bool = False
    reference: bool = False
    compared: bool = False
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
        """Of a step, over all processes."""
        return self.questions * self.group_size

    @property
    def own_rollouts(self) -> int:
        """Of a step, of one process."""
        return math.ceil(self.questions / self.processes) * self.group_size

    @property
    def shards(self) -> int:
        """Processes that share the parameters."""
        return self.processes if self.sharded else 1

    @property
    def micro_tokens(self) -> int:
        """The most tokens of one forward pass: the budget, but never less than a rollout."""
        share = math.ceil(self.rollouts * self.limit / self.mini_batches / self.processes)
        return max(self.limit, min(self.micro_batch_tokens, share))

    @property
    def peak_flops(self) -> float:
        """Operations per second of a device in the precision of its matrix products."""
        return 1e12 * (self.gpu.tflops if self.precision.compute == 2 else self.gpu.tflops32)

    @property
    def link(self) -> float:
        """Bytes per second that a device sends: over the network where there are several machines."""
        return self.gpu.link if self.nodes == 1 else min(self.gpu.link, self.assumed.network)
