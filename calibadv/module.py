"""The LightningModule: policy, reference, and one training step from questions to the gradient."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Literal

import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from typing_extensions import override

from calibadv.agent.diagnosis import diagnose
from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.rollout import Draws, check_engine
from calibadv.agent.tools import make_tools
from calibadv.batch import StepOutput, collate, to_device
from calibadv.calibrators import check_combination
from calibadv.data.datamodule import replacement_questions
from calibadv.interfaces import (
    AdvantageEstimator,
    Calibrator,
    Engine,
    GroupFilter,
    PolicyLoss,
    Protocol,
    Regularizer,
    Retriever,
    Reward,
    Tool,
)
from calibadv.losses.aggregation import check_length
from calibadv.numerics.kl import KLEstimator
from calibadv.policy.loading import check_positions, enable_checkpointing, load_policy
from calibadv.policy.lora import Lora
from calibadv.policy.precision import check_rate, float32_by_default
from calibadv.policy.reference import Reference, make_reference
from calibadv.protocol.search import SearchProtocol
from calibadv.training.advantages import compute_advantages
from calibadv.training.checks import (
    check_data,
    check_filter,
    check_importance_sampling,
    check_numbers,
    check_objective,
    check_replaced,
    check_trainer,
)
from calibadv.training.importance_sampling import TruncatedImportanceSampling
from calibadv.training.logprobs import UpdateBatch, compute_old_logprobs, loss_inputs
from calibadv.training.metrics import Stopwatch, rollout_metrics, speed_metrics, stability_metrics
from calibadv.training.minibatches import Batching
from calibadv.training.objective import Objective
from calibadv.training.optimization import UpdateMetrics, clip_gradient, dump_mini_batch
from calibadv.training.policy_module import PolicyModule, Schedule
from calibadv.training.sampling import RolloutSampler, collect_groups
from calibadv.types import Metrics, Question

log = logging.getLogger(__name__)


class SearchAgentModule(PolicyModule):
    """Train a search agent: sample rollouts, score them, estimate and calibrate advantages, update the policy.

    Args:
        policy: Hugging Face model folder, or ``embedded``.
        engine: samples the policy's tokens.
        reward: scores answers.
        estimator: turns rewards into advantages.
        loss: the surrogate that is minimised.
        protocol: the language of agent and environment, and its limits; by default that of one search engine.
        retriever: finds documents: the only tool, called ``search``.
        tools: what messages can call, in the place of ``retriever``.
        group_filter: which groups to train on; others take the place of those it drops. By default all are kept.
        optimizer: another optimizer than AdamW; with it, leave out learning_rate, betas and weight_decay.
        lr_scheduler: a scheduler of torch, advanced after each rollout step; with it, leave out schedule and
            warmup_steps.
        lora: train low-rank adapters in the place of all parameters.
        regularizers: further terms of the loss.
        kl_coef: weight of the KL divergence to the policy before training; 0 loads no reference.
        kl_estimator: how that KL is estimated; the gradient of k1 is not that of a KL (docs/method.md).
        rollout_steps: total number of rollout steps, including those before a resume.
        group_size: rollouts per question.
        temperature: of sampling in training; validation is greedy.
        learning_rate: peak learning rate of AdamW.
        schedule: ``constant``, or half a ``cosine`` from the peak to zero, which follows the last rollout step.
        warmup_steps: rollout steps over which the learning rate grows linearly from zero.
        betas: of AdamW.
        weight_decay: of AdamW.
        clip_norm: the gradient of a mini-batch is scaled down to this norm; 0 leaves it.
        mini_batches: optimizer steps per rollout step; each takes a block of whole questions.
        micro_batch_tokens: the most tokens, padding included, of one forward pass; bounds memory, changes no result.
        old_logprobs: source of the old log-probabilities: recomputed by the ``trainer``, or the ``engine``'s.
        sampler_correction: truncated importance sampling between trainer and engine.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        skip_tied: skip optimizer steps whose advantages are all 0 and to which no KL or regularizer applies.
        garbled_perplexity: a rollout counts as garbled if a message's perplexity is above this.
        seed: of questions, sampling and mini-batches; set by ``--seed_everything``.
    """

    calibrators: Sequence[Calibrator]

    def __init__(
        self,
        policy: str,
        engine: Engine,
        reward: Reward,
        estimator: AdvantageEstimator,
        loss: PolicyLoss,
        protocol: Protocol = lazy_instance(SearchProtocol),  # noqa: B008  # a default whose options can be set alone
        retriever: Retriever | None = None,
        tools: list[Tool] | None = None,
        group_filter: GroupFilter | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lora: Lora | None = None,
        regularizers: list[Regularizer] | None = None,
        kl_coef: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        rollout_steps: int = 100,
        group_size: int = 5,
        temperature: float = 1.0,
        learning_rate: float = 1e-6,
        schedule: Literal["constant", "cosine"] = "constant",
        warmup_steps: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        clip_norm: float = 1.0,
        mini_batches: int = 1,
        micro_batch_tokens: int = 16384,
        old_logprobs: Literal["trainer", "engine"] = "trainer",
        sampler_correction: TruncatedImportanceSampling | None = None,
        gradient_checkpointing: bool = False,
        skip_tied: bool = False,
        garbled_perplexity: float = 50.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_numbers(
            betas,
            temperature,
            rollout_steps=rollout_steps,
            group_size=group_size,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            kl_coef=kl_coef,
            mini_batches=mini_batches,
            micro_batch_tokens=micro_batch_tokens,
        )
        rates = {"learning_rate": (learning_rate, 1e-6), "betas": (betas, (0.9, 0.999))}
        check_replaced("optimizer", optimizer, {**rates, "weight_decay": (weight_decay, 0.01)})
        check_replaced(
            "lr_scheduler", lr_scheduler, {"schedule": (schedule, "constant"), "warmup_steps": (warmup_steps, 0)}
        )
        self.objective = Objective(loss, kl_coef, tuple(regularizers or ()), kl_estimator)
        check_objective(self.objective, mini_batches, old_logprobs)
        check_importance_sampling(old_logprobs, sampler_correction)
        check_filter(group_filter, estimator, group_size)
        check_length(loss, (protocol.max_searches + 1) * protocol.max_turn_tokens)
        environment = Environment(make_tools(retriever, tools))
        self.policy = load_policy(policy, lora, protocol.tags, protocol.stop_strings)
        self.model = self.policy.model
        if gradient_checkpointing:
            enable_checkpointing(self.policy)
        self.reference: Reference | None = make_reference(self.policy, lora) if kl_coef else None
        self.agent = Agent(engine, environment, protocol, self.policy.tokenizer)
        self.sampler = RolloutSampler(self.agent, self.policy, reward)
        self.group_filter = group_filter
        self.estimator = estimator
        self.calibrators = ()
        adamw = partial(torch.optim.AdamW, lr=learning_rate, betas=betas, weight_decay=weight_decay)
        self.make_optimizer = optimizer or adamw
        self.learning_rate = learning_rate if optimizer is None else None
        self.make_scheduler = lr_scheduler
        self.schedule = Schedule(schedule, warmup_steps, rollout_steps)
        self.rollout_steps = rollout_steps
        self.group_size = group_size
        self.temperature = temperature
        self.clip_norm = clip_norm
        self.batching = Batching(mini_batches, micro_batch_tokens, seed)
        self.micro_batch_tokens = micro_batch_tokens
        self.old_logprobs = old_logprobs
        self.importance_sampling = sampler_correction
        self.skip_tied = skip_tied
        self.garbled_perplexity = garbled_perplexity
        self.seed = seed

    @float32_by_default()
    @override
    def training_step(self, questions: list[Question], batch_idx: int) -> dict[str, StepOutput]:
        timer = Stopwatch()
        step, always = self.rollout_step + 1, self.objective.grad_without_advantage
        update, metrics = self.prepare_update(questions, timer)
        with timer.measure("update"):
            optimizer = self.start_update()
            steps = UpdateMetrics(self.processes, optimizer.param_groups[0]["lr"])
            for mini_batch in self.batching.cut(update.batch, update.advantages, step, always, self.processes):
                steps.without_advantage += not mini_batch.has_advantage
                if self.skip_tied and not (mini_batch.has_advantage or always):
                    continue
                optimizer.zero_grad()
                for micro_batch in mini_batch.micro_batches:
                    with torch.set_grad_enabled(micro_batch.needs_grad):
                        inputs = loss_inputs(self.model, update, micro_batch.rows, self.temperature, mini_batch.size)
                        loss, terms = self.objective.compute(inputs)
                    if micro_batch.needs_grad:
                        with self.gradient_sync(micro_batch.is_last):
                            self.manual_backward(loss * micro_batch.loss_scale)
                    steps.add(terms, micro_batch)
                norm = clip_gradient(self.model, self.clip_norm)
                dump = partial(dump_mini_batch, update, mini_batch.rows, norm, self.run_folder.nonfinite_step(step))
                stepped = self.finite_steps.step(optimizer, norm, mini_batch.name, dump, self.processes)
                steps.close(norm, stepped)
        return self.finish_step(update, {**metrics, **steps.summary()}, timer)

    def prepare_update(self, questions: Sequence[Question], timer: Stopwatch) -> tuple[UpdateBatch, Metrics]:
        """Sample and score rollouts, and compute their advantages and old log-probabilities."""
        step = self.rollout_step + 1
        draws = Draws(self.seed, step, self.group_size, self.temperature)
        sample = partial(
            self.sampler.sample_groups, draws=draws, processes=self.processes, waiting=self.waiting, timer=timer
        )
        replacements = replacement_questions(self.trainer, self.rollout_step, questions)
        groups, filter_metrics = collect_groups(questions, sample, self.group_filter, replacements, step)
        with timer.measure("evidence"):
            batch = to_device(collate(list(chain.from_iterable(groups))), self.device)
        with timer.measure("advantages"):
            extras = self.estimator.extras(batch, self.policy, self.micro_batch_tokens, self.processes)
            batch = replace(batch, extras=extras)
            estimated, calibrated, calibration_metrics = compute_advantages(batch, self.estimator, self.calibrators)
        with timer.measure("logprobs"):
            old = compute_old_logprobs(
                self.model, self.reference, batch, self.micro_batch_tokens, self.temperature, self.processes
            )
        metrics = {
            **rollout_metrics(batch, estimated, calibrated),
            **filter_metrics,
            **calibration_metrics,
            **stability_metrics(batch, old, self.garbled_perplexity),
        }
        update, weights = self.correct(UpdateBatch(batch, estimated, calibrated, old))
        return update, {**metrics, **weights}

    def correct(self, update: UpdateBatch) -> tuple[UpdateBatch, Metrics]:
        """Correct for the difference between engine and trainer, as the settings ask for."""
        weighted, metrics = self.importance_sampling.apply(update) if self.importance_sampling else (update, {})
        return weighted.with_engine_logprobs() if self.old_logprobs == "engine" else weighted, metrics

    def finish_step(self, update: UpdateBatch, metrics: Metrics, timer: Stopwatch) -> dict[str, StepOutput]:
        """Count the rollout step and log its metrics; the result goes to the callbacks."""
        self.finish_update()
        self.diagnosis = diagnose(update.batch.rollouts, self.agent.protocol, self.rollout_step)
        metrics = {**metrics, **speed_metrics(update.batch, timer.seconds), **self.agent.environment.metrics()}
        self.log_dict(metrics, logger=False, batch_size=1)  # for callbacks that monitor one
        self.log_at_step(metrics)
        self.trainer.should_stop = self.trainer.should_stop or self.rollout_step >= self.rollout_steps
        advantages = update.estimated, update.advantages
        return {"output": StepOutput(self.rollout_step, update.batch, *advantages, metrics, timer.seconds)}

    @override
    def setup(self, stage: str) -> None:
        fitting = stage == "fit"
        check_trainer(self.trainer, fitting)
        if fitting and self.learning_rate is not None:
            adapters = not all(parameter.requires_grad for parameter in self.model.parameters())
            check_rate(self.trainer.precision, adapters, self.learning_rate)
        if fitting and self.group_size == 1:
            log.warning(
                "model.group_size is 1: the rollouts of a question are compared, and there is nothing to compare"
            )
        check_combination(self.estimator, self.calibrators, self.group_size if fitting else None)
        self.agent.engine.validate()
        check_engine(self.agent)
        check_positions(self.policy, self.agent.protocol.max_rollout_tokens)
        self.sampler.engine_is_stale = True  # a checkpoint may be loaded after this, and parameters be sharded
        check_data(self.trainer, stage, self.agent, self.group_filter)
