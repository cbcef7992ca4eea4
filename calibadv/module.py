"""The LightningModule: policy, reference, and one training step from questions to the gradient."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self, cast

import lightning.pytorch as pl
import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from typing_extensions import override

from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.patience import Waiting
from calibadv.agent.rollout import Draws, check_engine
from calibadv.agent.tools import make_tools
from calibadv.batch import StepOutput, collate, to_device
from calibadv.calibrators import check_combination
from calibadv.data.datamodule import QuestionData
from calibadv.distributed import ProcessGroup, apply_fsdp, longest_wait, raising_together
from calibadv.errors import UserError
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
from calibadv.policy.precision import check_precision, check_rate, exactly, float32_by_default
from calibadv.policy.reference import Reference, make_reference
from calibadv.protocol.search import SearchProtocol
from calibadv.runs.folder import RunFolder
from calibadv.training.advantages import compute_advantages
from calibadv.training.checkpoint_compat import RunIdentity, check_optimizer, check_steps_left, check_weights
from calibadv.training.checks import (
    check_at_least,
    check_filter,
    check_objective,
    check_prompts,
    check_questions_per_step,
    check_sampling,
)
from calibadv.training.importance_sampling import TruncatedImportanceSampling
from calibadv.training.logprobs import UpdateBatch, compute_old_logprobs, loss_inputs
from calibadv.training.metrics import (
    evaluation_metrics,
    rollout_metrics,
    speed_metrics,
    stability_metrics,
    without_result,
)
from calibadv.training.minibatches import MiniBatch, make_mini_batch, mini_batches
from calibadv.training.objective import Objective
from calibadv.training.optimization import FiniteSteps, UpdateMetrics, clip_gradient, trained_parameters
from calibadv.training.sampling import RolloutSampler, check_searches, collect_groups
from calibadv.training.schedule import LearningRate
from calibadv.training.timer import Stopwatch
from calibadv.types import Metrics, Question, Rollout

log = logging.getLogger(__name__)


class SearchAgentModule(pl.LightningModule):
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
        self.automatic_optimization = False
        at_least = {
            "rollout_steps": (rollout_steps, 1),
            "group_size": (group_size, 1),
            "mini_batches": (mini_batches, 1),
            "micro_batch_tokens": (micro_batch_tokens, 1),
            "warmup_steps": (warmup_steps, 0),
            "kl_coef": (kl_coef, 0),
            "learning_rate": (learning_rate, 0),
            "weight_decay": (weight_decay, 0),
            "clip_norm": (clip_norm, 0),
        }
        for name, (value, bound) in at_least.items():
            check_at_least(name, value, bound)
        self.objective = Objective(loss, kl_coef, tuple(regularizers or ()), kl_estimator)
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"model.betas are {betas}; both must be at least 0 and below 1")
        check_sampling(temperature, old_logprobs, sampler_correction)
        check_objective(self.objective, mini_batches, old_logprobs)
        check_filter(group_filter, estimator, group_size)
        check_length(loss, (protocol.max_searches + 1) * protocol.max_turn_tokens)
        self.policy = load_policy(policy, lora, protocol.tags, protocol.stop_strings)
        self.model = self.policy.model
        if gradient_checkpointing:
            enable_checkpointing(self.policy)
        self.reference: Reference | None = make_reference(self.policy, lora) if kl_coef else None
        environment = Environment(make_tools(retriever, tools))
        self.agent = Agent(engine, environment, protocol, self.policy.tokenizer)
        self.sampler = RolloutSampler(self.agent, self.policy, reward)
        self.group_filter = group_filter
        self.estimator = estimator
        self.calibrators = ()
        self.learning_rate = LearningRate(learning_rate, schedule, warmup_steps, rollout_steps)
        self.lr_factor = 1.0
        self.betas = betas
        self.weight_decay = weight_decay
        self.rollout_steps = rollout_steps
        self.group_size = group_size
        self.temperature = temperature
        self.clip_norm = clip_norm
        self.mini_batches = mini_batches
        self.micro_batch_tokens = micro_batch_tokens
        self.old_logprobs = old_logprobs
        self.importance_sampling = sampler_correction
        self.skip_tied = skip_tied
        self.garbled_perplexity = garbled_perplexity
        self.seed = seed
        self.rollout_step = 0
        self.finished_step = 0  # the last one whose curves and rollout file are written
        self.mid_update = False
        self.stop_requested = False
        self.validated_step = -1
        self.finite_steps = FiniteSteps()
        self.evaluation: Metrics = {}
        self._evaluated: list[Rollout] = []
        self._sharded = False

    @property
    def processes(self) -> ProcessGroup:
        """The ranks that train together."""
        return ProcessGroup.current()

    @float32_by_default()
    @override
    def training_step(self, questions: list[Question], batch_idx: int) -> dict[str, StepOutput]:
        timer = Stopwatch()
        update, metrics = self.prepare_update(questions, timer)
        with timer.measure("update"):
            optimizer = self.start_update()
            steps = UpdateMetrics(self.processes, optimizer.param_groups[0]["lr"])
            for mini_batch in self.make_mini_batches(update):
                steps.without_advantage += not mini_batch.has_advantage
                if self.skip_tied and not (mini_batch.has_advantage or self.objective.grad_without_advantage):
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
                dump = self.run_folder.nonfinite_step(self.rollout_step + 1)
                stepped = self.finite_steps.step(optimizer, norm, update, mini_batch, dump, self.processes)
                steps.close(norm, stepped)
        return self.finish_step(update, {**metrics, **steps.summary()}, timer)

    def prepare_update(self, questions: Sequence[Question], timer: Stopwatch) -> tuple[UpdateBatch, Metrics]:
        """Sample and score rollouts, and compute their advantages and old log-probabilities.

        Args:
            questions: questions of this rollout step.
            timer: measures the stages.

        Returns:
            What the update needs, and the curves of the rollouts.
        """
        step = self.rollout_step + 1
        draws = Draws(self.seed, step, self.group_size, self.temperature)
        sample = partial(
            self.sampler.sample_groups, draws=draws, processes=self.processes, waiting=self._waiting(), timer=timer
        )
        groups, filter_metrics = collect_groups(
            questions, sample, self.group_filter, self._replacements(questions), step
        )
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
        metrics: Metrics = {}
        if self.importance_sampling is not None:
            update, metrics = self.importance_sampling.apply(update)
        if self.old_logprobs == "engine":
            update = replace(update, old=replace(update.old, logprobs=update.batch.sampled_logprobs))
        return update, metrics

    def _replacements(self, questions: Sequence[Question]) -> Iterator[Question]:
        if self.group_filter is None:
            return iter(())
        data = cast("QuestionData", getattr(self.trainer, "datamodule", None))
        return data.spare_questions(self.rollout_step, questions)

    def _waiting(self) -> Waiting | None:
        """In training, a retriever that is away is waited for: for less than ranks wait for each other."""
        if self.trainer.state.fn != "fit":
            return None
        cap = longest_wait(self.trainer.strategy) if self.processes.size > 1 else math.inf
        return Waiting(cap, lambda: self.stop_requested)

    def start_update(self) -> torch.optim.Optimizer:
        """Return the optimizer, with the learning rate of this rollout step."""
        optimizer = cast("torch.optim.Optimizer", self.optimizers())
        for group in optimizer.param_groups:
            group["lr"] = self.lr_factor * self.learning_rate.at(self.rollout_step + 1)
        return optimizer

    def make_mini_batches(self, update: UpdateBatch) -> list[MiniBatch]:
        """Cut the rollouts of an update into the mini-batches of this rollout step."""
        blocks = mini_batches(update.batch, self.mini_batches, self.seed, self.rollout_step + 1)
        return [
            make_mini_batch(
                f"rollout step {self.rollout_step + 1}, mini-batch {number} of {len(blocks)}",
                update.batch,
                update.advantages,
                rows,
                self.micro_batch_tokens,
                self.processes,
                self.objective.grad_without_advantage,
            )
            for number, rows in enumerate(blocks, 1)
        ]

    def gradient_sync(self, last: bool) -> AbstractContextManager[None]:
        """Sum gradients over the ranks only after the last backward pass of a mini-batch."""
        wait = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        return nullcontext() if last else wait()

    def finish_step(self, update: UpdateBatch, metrics: Metrics, timer: Stopwatch) -> dict[str, StepOutput]:
        """Count the rollout step and log its metrics; the result goes to the callbacks."""
        self.sampler.engine_is_stale = True
        self.rollout_step += 1
        self.mid_update = False
        metrics = {
            **metrics,
            **speed_metrics(update.batch, timer.seconds),
            **self.agent.environment.metrics(),
        }
        self.log_at_step(metrics)
        self.trainer.should_stop = self.trainer.should_stop or self.rollout_step >= self.rollout_steps
        output = StepOutput(
            self.rollout_step, update.batch, update.estimated, update.advantages, metrics, timer.seconds
        )
        return {"output": output}

    @property
    def run_folder(self) -> RunFolder:
        """The folder of the run."""
        return RunFolder(Path(self.trainer.default_root_dir))

    @override
    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self._sharded:
            assert self.device_mesh is not None, "the strategy has made it"
            for model in [self.model, *(self.reference.frozen if self.reference else [])]:
                apply_fsdp(model, self.device_mesh)
            self._sharded = True

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = trained_parameters(self.model)
        return torch.optim.AdamW(
            parameters, lr=self.learning_rate.peak, betas=self.betas, weight_decay=self.weight_decay
        )

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(exactly(self.model, fn), recurse)  # type: ignore[no-untyped-call]
        return self

    @override
    def setup(self, stage: str) -> None:
        fitting = stage == "fit"
        if fitting and (self.trainer.max_epochs, self.trainer.max_steps) != (-1, -1):
            raise UserError(
                f"trainer.max_epochs is {self.trainer.max_epochs} and trainer.max_steps is {self.trainer.max_steps}; "
                "both must be -1: set model.rollout_steps, which counts what you mean"
            )
        check_precision(self.trainer.precision)
        if fitting:
            adapters = not all(parameter.requires_grad for parameter in self.model.parameters())
            check_rate(self.trainer.precision, adapters, self.learning_rate.peak)
        if fitting and self.group_size == 1:
            log.warning(
                "model.group_size is 1: the rollouts of a question are compared, and there is nothing to compare"
            )
        check_combination(self.estimator, self.calibrators, self.group_size if fitting else None)
        self.agent.engine.validate()
        check_engine(self.agent)
        check_positions(self.policy, self.agent.protocol.max_rollout_tokens)
        self.sampler.engine_is_stale = True  # a checkpoint may be loaded after this, and parameters be sharded
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, QuestionData):
            if fitting:
                check_questions_per_step(data.questions_per_step, self.trainer.world_size)
            check_prompts(data.questions_for(stage), self.agent)
        elif fitting and self.group_filter is not None:
            raise UserError("model.group_filter asks further questions of QuestionData; give that to fit as datamodule")

    @override
    def on_fit_start(self) -> None:
        if self.reference is not None:
            self.reference.to(self.device, next(self.model.parameters()).dtype)

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.mid_update = True

    @override
    def on_train_start(self) -> None:
        self.finished_step = self.rollout_step
        due = self.rollout_step % self.trainer.val_check_interval == 0 and self.validated_step != self.rollout_step
        if due and self.trainer.enable_validation:
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True
        if self.rollout_step >= self.rollout_steps:  # only what comes behind the last step may have been missing
            self.trainer.should_stop = True

    @override
    def validation_step(self, questions: list[Question], batch_idx: int) -> dict[str, list[Rollout]]:
        return {"rollouts": self.evaluate(questions)}

    @override
    def test_step(self, questions: list[Question], batch_idx: int) -> dict[str, list[Rollout]]:
        return {"rollouts": self.evaluate(questions)}

    @override
    def predict_step(self, questions: list[Question], batch_idx: int) -> dict[str, list[Rollout]]:
        return {"rollouts": self.evaluate(questions)}

    @float32_by_default()
    def evaluate(self, questions: Sequence[Question]) -> list[Rollout]:
        """Answer questions greedily, one rollout each, and score them."""
        draws = Draws(self.seed, self.rollout_step, samples=1, temperature=0.0)
        groups = self.sampler.sample_groups(questions, draws, self.processes, credit=False)
        with raising_together():
            check_searches(groups, self.rollout_step)
        rollouts = list(chain.from_iterable(groups))
        self._evaluated.extend(rollouts)
        return rollouts

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")
        self.validated_step = self.rollout_step

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, prefix: str) -> None:
        self.evaluation = evaluation_metrics(self._evaluated)
        self._evaluated.clear()
        if (missing := without_result(self.evaluation)) and self.trainer.is_global_zero:
            log.warning(
                "%s at step %d: %s, since their search failed; its means are over the others, and not comparable with "
                "those over all questions",
                {"val": "validation"}.get(prefix, prefix),
                self.rollout_step,
                missing,
            )
        metrics = {f"{prefix}/{name}": value for name, value in self.evaluation.items()}
        self.log_dict(metrics, logger=False, sync_dist=True)  # for callbacks that monitor one; equal on all processes
        self.log_at_step(metrics)

    def log_at_step(self, metrics: Metrics) -> None:
        """Plot metrics against the rollout step, through whatever loggers there are."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.rollout_step)

    @property
    def identity(self) -> RunIdentity:
        """What tells this run from another: written into its checkpoints."""
        return RunIdentity(
            seed=self.seed,
            protocol=self.agent.protocol.settings(),
            reference=None if self.reference is None else self.reference.digest,
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= self.identity.to_checkpoint()
        checkpoint["rollout_step"] = self.rollout_step
        checkpoint["validated_step"] = self.validated_step
        checkpoint["skipped_in_a_row"] = self.finite_steps.skipped_in_a_row

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        training = self.trainer.state.fn == "fit"
        if training:
            check_steps_left(checkpoint, self.rollout_steps)
        self.identity.check(checkpoint, training)
        if "state_dict" in checkpoint:  # in a sharded checkpoint torch compares the shards
            check_weights(checkpoint["state_dict"], self.state_dict())
            if training:
                check_optimizer(checkpoint["optimizer_states"], trained_parameters(self.model))
        self.rollout_step = checkpoint["rollout_step"]
        self.validated_step = checkpoint["validated_step"]
        self.finite_steps.skipped_in_a_row = checkpoint.get("skipped_in_a_row", 0)  # older checkpoints do not hold it
