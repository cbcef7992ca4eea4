"""The LightningModule of supervised fine-tuning: the same agent, protocol, masks and checkpoints as in ``fit``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from typing_extensions import override

from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.rollout import check_engine
from calibadv.agent.tools import make_tools
from calibadv.batch import RolloutBatch, StepOutput, collate, to_device
from calibadv.errors import UserError
from calibadv.interfaces import Engine, Protocol, Retriever, Reward, Tool
from calibadv.policy.loading import check_positions, enable_checkpointing, load_policy
from calibadv.policy.logprobs import forward_logprobs
from calibadv.policy.lora import Lora
from calibadv.policy.precision import check_rate, float32_by_default
from calibadv.protocol.search import SearchProtocol
from calibadv.sft.data import Demonstrations
from calibadv.training.checks import check_numbers, check_replaced, check_trainer
from calibadv.training.metrics import Stopwatch, shape_metrics
from calibadv.training.minibatches import partition_micro_batches
from calibadv.training.optimization import clip_gradient, dump_tensors
from calibadv.training.policy_module import PolicyModule, Schedule
from calibadv.training.sampling import RolloutSampler
from calibadv.types import Rollout


class SupervisedModule(PolicyModule):
    """Fit a policy to demonstrations: the mean negative log-probability of its messages' tokens.

    Validation samples real rollouts, as in ``fit``. A step is one optimizer step.

    Args:
        policy: Hugging Face model folder, or ``embedded``.
        engine: samples the policy's tokens in validation.
        reward: scores answers in validation.
        protocol: the language of agent and environment, and its limits; that of the demonstrations.
        retriever: finds documents in validation.
        tools: what messages can call, in the place of ``retriever``.
        optimizer: another optimizer than AdamW; with it, leave out learning_rate, betas and weight_decay.
        lr_scheduler: a scheduler of torch, advanced after each step; with it, leave out schedule and warmup_steps.
        lora: train low-rank adapters in the place of all parameters.
        learning_rate: peak learning rate of AdamW.
        schedule: ``constant``, or half a ``cosine`` from the peak to zero.
        warmup_steps: steps over which the learning rate grows linearly from zero.
        betas: of AdamW.
        weight_decay: of AdamW.
        clip_norm: the gradient is scaled down to this norm; 0 leaves it.
        micro_batch_tokens: the most tokens, padding included, of one forward pass; bounds memory, changes no result.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        rest_weight: weight in the loss of the tokens that the policy does not write: prompt and observations.
        seed: of the order of the demonstrations; set by ``--seed_everything``.
    """

    first_stage = "update"

    def __init__(
        self,
        policy: str,
        engine: Engine,
        reward: Reward,
        protocol: Protocol = lazy_instance(SearchProtocol),  # noqa: B008  # a default whose options can be set alone
        retriever: Retriever | None = None,
        tools: list[Tool] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lora: Lora | None = None,
        learning_rate: float = 1e-5,
        schedule: Literal["constant", "cosine"] = "constant",
        warmup_steps: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        clip_norm: float = 1.0,
        micro_batch_tokens: int = 16384,
        gradient_checkpointing: bool = False,
        rest_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_numbers(
            betas,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            micro_batch_tokens=micro_batch_tokens,
        )
        if not 0 <= rest_weight <= 1:
            raise UserError(f"model.rest_weight is {rest_weight}; it must be from 0 to 1")
        rates = {"learning_rate": (learning_rate, 1e-5), "betas": (betas, (0.9, 0.999))}
        check_replaced("optimizer", optimizer, {**rates, "weight_decay": (weight_decay, 0.01)})
        check_replaced(
            "lr_scheduler", lr_scheduler, {"schedule": (schedule, "constant"), "warmup_steps": (warmup_steps, 0)}
        )
        self.policy = load_policy(policy, lora, protocol.tags, protocol.stop_strings)
        self.model = self.policy.model
        if gradient_checkpointing:
            enable_checkpointing(self.policy)
        self.reference = None
        self.agent = Agent(engine, Environment(make_tools(retriever, tools)), protocol, self.policy.tokenizer)
        self.sampler = RolloutSampler(self.agent, self.policy, reward)
        self.make_optimizer = optimizer or partial(
            torch.optim.AdamW, lr=learning_rate, betas=betas, weight_decay=weight_decay
        )
        self.learning_rate = learning_rate if optimizer is None else None
        self.make_scheduler = lr_scheduler
        self._schedule = partial(Schedule, schedule, warmup_steps)
        self.schedule, self.rollout_steps = self._schedule(1), 1  # until the demonstrations are counted
        self.clip_norm = clip_norm
        self.micro_batch_tokens = micro_batch_tokens
        self.rest_weight = rest_weight
        self.seed = seed

    @override
    def setup(self, stage: str) -> None:
        fitting = stage == "fit"
        check_trainer(self.trainer, fitting)
        if fitting and self.learning_rate is not None:
            adapters = not all(parameter.requires_grad for parameter in self.model.parameters())
            check_rate(self.trainer.precision, adapters, self.learning_rate)
        self.agent.engine.validate()
        check_engine(self.agent)
        check_positions(self.policy, self.agent.protocol.max_rollout_tokens)
        self.sampler.engine_is_stale = True
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, Demonstrations):
            raise UserError("supervised training needs demonstrations; give DemonstrationData to fit as datamodule")
        data.encode(self.agent)
        self.rollout_steps = data.steps
        self.schedule = self._schedule(data.steps)

    @float32_by_default()
    @override
    def training_step(self, demonstrations: list[Rollout], batch_idx: int) -> dict[str, StepOutput]:
        timer, step = Stopwatch(), self.rollout_step + 1
        batch, weights = weigh(to_device(collate(demonstrations), self.device), self.rest_weight)
        with timer.measure("update"):
            optimizer = self.start_update()
            optimizer.zero_grad()
            total, loss_sum = weights.sum(), weights.new_zeros(1)
            parts = partition_micro_batches(batch, range(len(demonstrations)), self.micro_batch_tokens, self.processes)
            for number, (rows, is_padding) in enumerate(parts, 1):
                logprobs, _ = forward_logprobs(self.model, batch, rows, temperature=1.0)
                loss = -(logprobs * weights[rows][batch.loss_mask[rows]]).sum() / total
                with self.gradient_sync(number == len(parts)):
                    self.manual_backward(loss * (0.0 if is_padding else float(self.processes.size)))
                loss_sum += 0.0 if is_padding else loss.detach()
            norm = clip_gradient(self.model, self.clip_norm)
            dump = partial(dump_tensors, self._dumped(batch, weights), self.run_folder.nonfinite_step(step))
            self.finite_steps.step(optimizer, norm, f"step {step}", dump, self.processes)
        metrics = {
            "sft/loss": self.processes.all_reduce_sum(loss_sum).item(),
            "stability/grad_norm": norm,
            "update/learning_rate": optimizer.param_groups[0]["lr"],
            **shape_metrics(demonstrations),
        }
        return self.finish_step(batch, metrics, timer)

    def _dumped(self, batch: RolloutBatch, weights: Tensor) -> dict[str, object]:
        questions = [rollout.question.id for rollout in batch.rollouts]
        return {"question_ids": questions, "token_ids": batch.token_ids, "weights": weights}

    def finish_step(self, batch: RolloutBatch, metrics: dict[str, float], timer: Stopwatch) -> dict[str, StepOutput]:
        """Count the step and log its metrics; the result goes to the callbacks."""
        self.finish_update()
        metrics = {**metrics, "update/seconds": timer.seconds["update"]}
        self.log_dict(metrics, logger=False, batch_size=1)
        self.log_at_step(metrics)
        self.trainer.should_stop = self.trainer.should_stop or self.rollout_step >= self.rollout_steps
        none = torch.zeros_like(batch.sampled_logprobs)
        return {"output": StepOutput(self.rollout_step, batch, none, none, metrics, timer.seconds)}


def weigh(batch: RolloutBatch, rest_weight: float) -> tuple[RolloutBatch, Tensor]:
    """Return a batch whose loss mask covers all tokens with a weight, and the weights.

    Args:
        batch: B demonstrations.
        rest_weight: of the tokens that the policy does not write; 0 leaves them out.

    Returns:
        The batch, and [B, T] of weights: 1 for the policy's tokens.
    """
    weights = batch.loss_mask.float()
    if rest_weight:
        rest = batch.attention_mask & ~batch.loss_mask
        rest[:, 0] = False  # nothing stands before it
        batch = replace(batch, loss_mask=batch.loss_mask | rest)
        weights = weights + rest_weight * rest
    return batch, weights
