"""Optimizer steps: the objective, the learning rate, and the passes over a rollout batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from calibadv.interfaces import LossInputs, Metrics, PolicyLoss, Regularizer
from calibadv.numerics.kl import k3
from calibadv.update import ReadyBatch, loss_inputs, micro_batches, mini_batches

# Curves of every update, which no part may report another value of.
_OURS = ("loss", "kl_old", "kl_reference", "grad_norm", "grad_norm_max")


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: the policy loss, the KL to the reference, and further terms."""

    loss: PolicyLoss
    kl_coef: float
    regularizers: tuple[Regularizer, ...]

    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        """Add up the terms for one micro-batch.

        Args:
            inputs: N trained tokens.

        Returns:
            A scalar with gradient; and metrics that add up over micro-batches.
        """
        loss, reported = self.loss.compute(inputs)
        metrics = _merge({}, reported, self.loss)
        metrics["kl_old"] = k3(inputs.logprobs.detach(), inputs.old_logprobs).sum().item() / inputs.denominator
        if inputs.reference_logprobs is not None:
            kl = k3(inputs.logprobs, inputs.reference_logprobs).sum() / inputs.denominator
            loss = loss + self.kl_coef * kl
            metrics["kl_reference"] = kl.item()
        for regularizer in self.regularizers:
            term, reported = regularizer.compute(inputs)
            loss = loss + term
            metrics = _merge(metrics, reported, regularizer)
        return loss, {**metrics, "loss": loss.item()}

    def split(self, ready: ReadyBatch, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Tell the rollouts that move the policy from those that only count, and so need no backward pass.

        Where the advantages of a rollout are all 0, as in a group with equal rewards, the gradient of the policy loss
        is exactly 0; a KL or another term still pulls on it.

        Args:
            ready: the rollout batch.
            rows: a mini-batch.

        Returns:
            The two parts of ``rows``. Where nothing would move all are in the first, so that the gradient is 0 and not
            missing: to AdamW that is a difference.
        """
        has_advantage = ready.advantages.any(dim=1).tolist()
        moving = [row for row in rows if has_advantage[row]]
        if self.kl_coef or self.regularizers or not moving:
            return list(rows), []
        return moving, [row for row in rows if not has_advantage[row]]


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The learning rate as a function of the rollout step: the same for all its mini-batches."""

    peak: float
    schedule: Literal["constant", "cosine"]
    warmup_steps: int
    rollout_steps: int

    def at(self, step: int) -> float:
        """Compute the learning rate of a rollout step.

        Args:
            step: from 1.

        Returns:
            Grows linearly over ``warmup_steps``, then stays at the peak or falls as half a cosine.
        """
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.schedule == "constant":
            return self.peak
        progress = (step - 1 - self.warmup_steps) / max(self.rollout_steps - self.warmup_steps, 1)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


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
    skip_tied: bool
    seed: int

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make AdamW over the parameters that are trained.

        Args:
            model: the policy.

        Returns:
            The optimizer; ``update`` sets its learning rate at every rollout step.
        """
        return torch.optim.AdamW(
            _trained(model), lr=self.learning_rate.peak, betas=self.betas, weight_decay=self.weight_decay
        )

    def update(
        self,
        model: nn.Module,
        ready: ReadyBatch,
        step: int,
        optimizer: torch.optim.Optimizer,
        backward: Callable[[Tensor], None],
    ) -> Metrics:
        """Make one optimizer step per mini-batch.

        Args:
            model: the policy.
            ready: rollouts, calibrated advantages, and log-probabilities before the update.
            step: rollout step, from 1.
            optimizer: of ``make_optimizer``.
            backward: computes gradients; Lightning's ``manual_backward`` in training.

        Returns:
            Metrics of the update.
        """
        if self.old_logprobs == "engine":
            ready = replace(ready, before=replace(ready.before, policy=ready.batch.sampled_logprobs))
        rate = self.learning_rate.at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tied = 0
        updates: list[Metrics] = []
        for rows in mini_batches(ready.batch, self.mini_batches, self.seed, step):
            is_tied = not bool(ready.advantages[rows].any())
            tied += is_tied
            if not (is_tied and self.skip_tied):
                gradient = self.accumulate(model, ready, rows, optimizer, backward)
                optimizer.step()
                updates.append(gradient)
        return {"update/learning_rate": rate, "credit/tied_updates": float(tied), **_summarise(updates)}

    def accumulate(
        self,
        model: nn.Module,
        ready: ReadyBatch,
        rows: Sequence[int],
        optimizer: torch.optim.Optimizer,
        backward: Callable[[Tensor], None],
    ) -> Metrics:
        """Compute the clipped gradient of one mini-batch.

        Args:
            model: the policy; its gradients are set.
            ready: rollouts, calibrated advantages, and log-probabilities before the update.
            rows: the mini-batch.
            optimizer: clears the gradients of before.
            backward: computes gradients.

        Returns:
            Loss, norm of the gradient before clipping, and what the loss reports.
        """
        optimizer.zero_grad()
        denominator = float(ready.batch.loss_mask[rows].sum().item())
        total: Metrics = {}
        moving, still = self.objective.split(ready, rows)
        parts = [micro_batches(ready.batch, some, self.micro_batch_tokens) for some in (moving, still)]
        for place, part in enumerate(chain(*parts)):
            moves = place < len(parts[0])
            with torch.set_grad_enabled(moves):
                loss, metrics = self.objective.compute(loss_inputs(model, ready, part, self.temperature, denominator))
            if moves:
                backward(loss)
            for name, value in metrics.items():
                total[name] = total.get(name, 0.0) + value
        norm = torch.nn.utils.clip_grad_norm_(_trained(model), self.clip_norm or math.inf)
        return {**total, "grad_norm": norm.item()}


def _merge(metrics: Metrics, reported: Metrics, part: PolicyLoss | Regularizer) -> Metrics:
    taken = reported.keys() & {*metrics, *_OURS}
    if taken:
        raise ValueError(f"{type(part).__name__} reports the metric '{min(taken)}', which is taken; rename it there")
    return {**metrics, **reported}


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
