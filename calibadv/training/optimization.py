"""Optimizer steps: the learning rate, and the passes over a rollout batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from calibadv.distributed import ALONE, Processes, drop_gathered, whole
from calibadv.errors import UserError
from calibadv.training.importance_sampling import truncated_weights
from calibadv.training.logprobs import MiniBatchSize, ReadyBatch, loss_inputs
from calibadv.training.minibatches import deal_micro_batches, mini_batches
from calibadv.training.nonfinite import MOST_IN_A_ROW, NonFiniteStepError, SkippedSteps
from calibadv.training.objective import Objective
from calibadv.training.schedule import LearningRate
from calibadv.types import Metrics

log = logging.getLogger(__name__)


@dataclass
class SamplerCorrection:
    """Weigh tokens by the trainer's over the engine's probability, cut at a cap: their numerics may differ."""

    level: Literal["token", "sequence"] = "token"
    """One weight per token, or one per rollout."""
    cap: float = 2.0
    """The largest weight."""

    def __post_init__(self) -> None:
        """Check the cap."""
        if self.cap < 1:
            raise UserError(f"model.sampler_correction.cap is {self.cap}; it must be at least 1")

    def apply(self, ready: ReadyBatch) -> tuple[ReadyBatch, Metrics]:
        """Weigh the advantages: a surrogate that is a multiple of them is weighed as a whole."""
        mask = ready.batch.loss_mask
        if not mask.any():
            return ready, {}
        weights = truncated_weights(ready.before.policy, ready.batch.sampled_logprobs, mask, self.level, self.cap)
        metrics = {
            "stability/sampler_weight": weights[mask].mean().item(),
            "stability/sampler_weight_cut": (weights[mask] == self.cap).float().mean().item(),
        }
        return replace(ready, advantages=ready.advantages * weights), metrics


@dataclass(frozen=True, slots=True)
class Trainee:
    """What is trained, and how gradients come to be.

    Attributes:
        model: the policy.
        optimizer: of ``Learner.make_optimizer``.
        backward: computes gradients of a loss; Lightning's ``manual_backward`` in training. It is told whether this is
            the last backward pass of a mini-batch, after which processes add their gradients up.
        processes: those that train together.
        skipped: counts optimizer steps that are left out; one for the whole run.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    backward: Callable[[Tensor, bool], None]
    processes: Processes = ALONE
    skipped: SkippedSteps = field(default_factory=SkippedSteps)


@dataclass(frozen=True, slots=True)
class Learner:
    """One pass of optimizer steps over a rollout batch; the parameters are those of SearchAgentModule."""

    objective: Objective
    learning_rate: LearningRate
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    mini_batches: int
    micro_batch_tokens: int
    temperature: float
    old_logprobs: Literal["trainer", "engine"]
    sampler_correction: SamplerCorrection | None
    skip_tied: bool
    seed: int

    def __post_init__(self) -> None:
        """Check the settings."""
        at_least = {
            "mini_batches": (self.mini_batches, 1),
            "micro_batch_tokens": (self.micro_batch_tokens, 1),
            "warmup_steps": (self.learning_rate.warmup_steps, 0),
            "kl_coef": (self.objective.kl_coef, 0),
            "learning_rate": (self.learning_rate.peak, 0),
            "weight_decay": (self.weight_decay, 0),
            "clip_norm": (self.clip_norm, 0),
        }
        for name, (value, bound) in at_least.items():
            check_at_least(name, value, bound)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"model.betas are {self.betas}; both must be at least 0 and below 1")
        if self.temperature <= 0:
            raise UserError(
                f"model.temperature is {self.temperature}; it must be above 0 (validation is greedy anyway)"
            )
        if self.old_logprobs == "engine" and self.sampler_correction is not None:
            raise UserError(
                "model.sampler_correction is set and model.old_logprobs is engine, whose ratio holds that correction "
                "already; leave one of them out"
            )
        self.objective.check(self.mini_batches, self.old_logprobs)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make AdamW over the parameters that are trained."""
        return torch.optim.AdamW(
            _trained(model), lr=self.learning_rate.peak, betas=self.betas, weight_decay=self.weight_decay
        )

    def update(self, trainee: Trainee, ready: ReadyBatch, step: int) -> Metrics:
        """Make one optimizer step per mini-batch, but for those whose gradient is not finite."""
        correction: Metrics = {}
        if self.sampler_correction is not None:
            ready, correction = self.sampler_correction.apply(ready)
        if self.old_logprobs == "engine":
            ready = replace(ready, before=replace(ready.before, policy=ready.batch.sampled_logprobs))
        rate = self.learning_rate.at(step)
        for group in trainee.optimizer.param_groups:
            group["lr"] = rate
        tied, skipped = 0, 0
        updates: list[Metrics] = []
        blocks = mini_batches(ready.batch, self.mini_batches, self.seed, step)
        for number, rows in enumerate(blocks, 1):
            is_tied = not bool(ready.advantages[rows].any())
            tied += is_tied
            if not (is_tied and self.skip_tied) or self.objective.acts_without_advantage:
                metrics = self.accumulate(trainee, ready, rows)
                norm = metrics["grad_norm"]
                if make_step(trainee, norm, f"rollout step {step}, mini-batch {number} of {len(blocks)}"):
                    updates.append(metrics)
                    continue
                skipped += 1
                if trainee.skipped.in_a_row >= MOST_IN_A_ROW:
                    raise NonFiniteStepError(ready, rows, norm)
        counts = {"stability/skipped_updates": float(skipped)} if skipped else {}
        counts["credit/tied_updates"] = float(tied)
        return {"update/learning_rate": rate, **counts, **correction, **_summarise(updates)}

    def accumulate(self, trainee: Trainee, ready: ReadyBatch, rows: Sequence[int]) -> Metrics:
        """Compute the clipped gradient of one mini-batch."""
        trainee.optimizer.zero_grad()
        size = MiniBatchSize.of(ready.batch, rows)
        moving, still = (
            deal_micro_batches(ready.batch, some, self.micro_batch_tokens, trainee.processes)
            for some in self.objective.split(ready, rows)
        )
        total: Metrics = {}
        for place, (part, counts) in enumerate([*moving, *still]):
            moves = place < len(moving)
            with torch.set_grad_enabled(moves):
                inputs = loss_inputs(trainee.model, ready, part, self.temperature, size)
                loss, metrics = self.objective.compute(inputs)
            if moves:
                # Processes take the mean of their gradients, where ours are parts of one sum.
                trainee.backward(loss * (trainee.processes.size if counts else 0.0), place == len(moving) - 1)
            for name, value in metrics.items():
                total[name] = total.get(name, 0.0) + value * counts
        drop_gathered(trainee.model)
        norm = torch.nn.utils.clip_grad_norm_(_trained(trainee.model), self.clip_norm or math.inf)
        return {**trainee.processes.total(total), "grad_norm": whole(norm).item()}


def make_step(trainee: Trainee, norm: float, where: str) -> bool:
    """Make an optimizer step, unless its gradient is not finite: one such step would make all parameters NaN."""
    if not trainee.processes.any(not math.isfinite(norm)):
        trainee.optimizer.step()
        trainee.skipped.in_a_row = 0
        return True
    trainee.optimizer.zero_grad()
    trainee.skipped.in_a_row += 1
    if trainee.processes.rank == 0:
        log.warning(
            "%s: the norm of the gradient is %s; no optimizer step is made (%d in a row, at %d the run stops)",
            *(where, norm, trainee.skipped.in_a_row, MOST_IN_A_ROW),
        )
    return False


def check_at_least(name: str, value: float, bound: float) -> None:
    """Refuse a setting of the model section that is too small."""
    if value < bound:
        raise UserError(f"model.{name} is {value}; it must be at least {bound}")


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _summarise(updates: list[Metrics]) -> Metrics:
    """Means over mini-batches; of the KL to the policy before the update, the last, where it is largest."""
    if not updates:
        return {}
    values: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.items():
            values.setdefault(name, []).append(value)
    metrics = {f"stability/{name}": sum(column) / len(column) for name, column in values.items()}
    metrics["update/loss"] = metrics.pop("stability/loss")
    metrics["stability/kl_old"] = values["kl_old"][-1]
    metrics["stability/grad_norm_max"] = max(values["grad_norm"])
    return metrics
