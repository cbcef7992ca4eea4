"""The LightningModule: policy, reference, and one training step from questions to the gradient."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from typing_extensions import override

from calibadv.agent.episode import Agent
from calibadv.agent.rollout import Draws, check_engine, check_prompt, check_searches, run_rollouts
from calibadv.agent.searching import Waiting
from calibadv.batch import RolloutBatch, StepOutput, collate, to_device
from calibadv.calibrators import check_combination
from calibadv.data.datamodule import QuestionData
from calibadv.distributed import Attempt, Processes, longest_wait, raising_together, shard
from calibadv.errors import UserError
from calibadv.filters import Group, check_filter, refill
from calibadv.interfaces import (
    AdvantageEstimator,
    Calibrator,
    Engine,
    GroupFilter,
    PolicyLoss,
    Regularizer,
    Retriever,
    Reward,
)
from calibadv.losses.aggregation import check_length
from calibadv.numerics.kl import KLEstimator
from calibadv.policy.loading import check_positions, enable_checkpointing, load_policy
from calibadv.policy.lora import Lora
from calibadv.policy.precision import check_precision, check_rate, exactly, float32_by_default
from calibadv.policy.reference import Reference, make_reference
from calibadv.protocol.search import Protocol
from calibadv.rewards.evidence import credit_rollouts
from calibadv.rewards.scoring import score_rollouts
from calibadv.runs.folder import RunFolder
from calibadv.training.advantages import compute_advantages
from calibadv.training.checkpoint_compat import check_identity, save_identity
from calibadv.training.logprobs import BatchLogprobs, ReadyBatch, compute_logprobs
from calibadv.training.metrics import (
    evaluation_metrics,
    rollout_metrics,
    speed_metrics,
    stability_metrics,
    without_result,
)
from calibadv.training.nonfinite import MOST_IN_A_ROW, NonFiniteStepError, SkippedSteps
from calibadv.training.objective import Objective
from calibadv.training.optimization import Learner, SamplerCorrection, Trainee, check_at_least
from calibadv.training.schedule import LearningRate
from calibadv.training.timer import Stopwatch
from calibadv.types import Metrics, Question, Rollout

log = logging.getLogger(__name__)

# Of a larger file only the longest questions are checked before the run: encoding all would take minutes.
_PROMPTS_CHECKED = 5000


class SearchAgentModule(pl.LightningModule):
    """Train a search agent: sample rollouts, score them, estimate and calibrate advantages, update the policy.

    Args:
        policy: Hugging Face model folder, or ``embedded``.
        engine: samples the policy's tokens.
        retriever: finds documents.
        reward: scores answers.
        estimator: turns rewards into advantages.
        loss: the surrogate that is minimised.
        protocol: how agent and environment talk, and how long they may.
        group_filter: which groups to train on; others take the place of those it drops. By default all are kept.
        lora: train low-rank adapters in the place of all parameters.
        regularizers: further terms of the loss.
        kl_coef: weight of the KL divergence to the policy before training; 0 loads no reference.
        kl_estimator: how that KL is estimated; the gradient of k1 is not that of a KL (docs/method.md).
        rollout_steps: stop after this many rollout steps, those before a resume included.
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
        old_logprobs: the ratio's denominator: recomputed by the ``trainer``, or those of the ``engine``.
        sampler_correction: weigh tokens by how much likelier the trainer's model draws them than the engine did.
        gradient_checkpointing: compute activations again on the way back: less memory, more time.
        skip_tied: leave out the optimizer step of mini-batches whose advantages are all 0, if no other term acts there.
        garbled_perplexity: a rollout counts as garbled if a message's perplexity is above this.
        seed: of questions, sampling and mini-batches; set by ``--seed_everything``.
    """

    calibrators: Sequence[Calibrator]

    def __init__(
        self,
        policy: str,
        engine: Engine,
        retriever: Retriever,
        reward: Reward,
        estimator: AdvantageEstimator,
        loss: PolicyLoss,
        protocol: Protocol,
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
        sampler_correction: SamplerCorrection | None = None,
        gradient_checkpointing: bool = False,
        skip_tied: bool = False,
        garbled_perplexity: float = 50.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_at_least("rollout_steps", rollout_steps, 1)
        check_at_least("group_size", group_size, 1)
        check_filter(group_filter, estimator, group_size)
        check_length(loss, (protocol.max_searches + 1) * protocol.max_turn_tokens)
        self.learner = Learner(
            objective=Objective(loss, kl_coef, tuple(regularizers or ()), kl_estimator),
            learning_rate=LearningRate(learning_rate, schedule, warmup_steps, rollout_steps),
            betas=betas,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            mini_batches=mini_batches,
            micro_batch_tokens=micro_batch_tokens,
            temperature=temperature,
            old_logprobs=old_logprobs,
            sampler_correction=sampler_correction,
            skip_tied=skip_tied,
            seed=seed,
        )
        self.policy = load_policy(policy, lora)
        self.model = self.policy.model
        if gradient_checkpointing:
            enable_checkpointing(self.policy)
        self.reference: Reference | None = make_reference(self.policy, lora) if kl_coef else None
        self.agent = Agent(engine, retriever, protocol, self.policy.tokenizer)
        self.reward = reward
        self.group_filter = group_filter
        self.estimator = estimator
        self.calibrators = ()
        self.rollout_steps = rollout_steps
        self.group_size = group_size
        self.temperature = temperature
        self.micro_batch_tokens = micro_batch_tokens
        self.garbled_perplexity = garbled_perplexity
        self.seed = seed
        self.rollout_step = 0
        self.finished_step = 0  # the last one whose curves and rollout file are written
        self.mid_update = False
        self.stop_requested = False
        self.validated_step = -1
        self.skipped = SkippedSteps()
        self.evaluation: Metrics = {}
        self._evaluated: list[Rollout] = []
        self._sharded = False
        self._engine_is_stale = True

    @float32_by_default()
    @override
    def training_step(self, questions: list[Question], batch_idx: int) -> dict[str, StepOutput]:
        clock = Stopwatch()
        groups, filter_metrics = self.collect(questions, clock)
        with clock.measure("evidence"):
            batch = to_device(collate(list(chain.from_iterable(groups))), self.device)
        with clock.measure("advantages"):
            batch = self.estimator.prepare(batch, self.policy, self.micro_batch_tokens, self.processes)
            estimated, calibrated, calibration_metrics = compute_advantages(batch, self.estimator, self.calibrators)
        with clock.measure("logprobs"):
            before = self.logprobs_before(batch)
        with clock.measure("update"):
            update_metrics = self.update(ReadyBatch(batch, calibrated, before))
        self._engine_is_stale = True
        self.rollout_step += 1
        self.mid_update = False
        metrics = {
            **rollout_metrics(batch, estimated, calibrated),
            **filter_metrics,
            **calibration_metrics,
            **stability_metrics(batch, before, self.garbled_perplexity),
            **update_metrics,
            **speed_metrics(batch, clock.seconds),
            **{f"retrieval/{name}": value for name, value in self.agent.retriever.metrics().items()},
        }
        self.log_at_step(metrics)
        self.trainer.should_stop = self.trainer.should_stop or self.rollout_step >= self.rollout_steps
        return {"output": StepOutput(self.rollout_step, batch, estimated, calibrated, metrics, clock.seconds)}

    def collect(self, questions: Sequence[Question], clock: Stopwatch) -> tuple[list[Group], Metrics]:
        """Sample and score the groups of a rollout step; groups that the filter drops are replaced."""
        step, seen = self.rollout_step + 1, list[Group]()

        def make(asked: Sequence[Question]) -> list[Rollout]:
            with clock.measure("rollout"):
                own = self.sample(asked, step, self.group_size, self.temperature)
            with clock.measure("evidence"):
                return credit_rollouts(score_rollouts(own, self.reward))

        def ask(asked: Sequence[Question]) -> list[Group]:
            own = self.processes.attempt(partial(make, asked))
            with clock.measure("evidence"):
                groups = self.share(asked, own, self.group_size)
            seen.extend(groups)
            with raising_together():
                check_searches(seen, step)  # all of the step: a few alone say little of the retriever
            return groups

        groups = ask(questions)
        if self.group_filter is None:
            return groups, {}
        data = cast("QuestionData", getattr(self.trainer, "datamodule", None))
        return refill(groups, self.group_filter, data.spare_questions(self.rollout_step, questions), ask)

    def sample(self, questions: Sequence[Question], step: int, samples: int, temperature: float) -> list[Rollout]:
        """Sample rollouts, each process those of its own questions."""
        if self._engine_is_stale:
            self.agent.engine.sync(self.policy)
            self._engine_is_stale = False
        draws = Draws(self.seed, step, samples, temperature)
        return run_rollouts(questions, self.agent, draws, self.processes, self._waiting())

    def _waiting(self) -> Waiting | None:
        """In training, a retriever that is away is waited for: for less than processes wait for each other."""
        if self.trainer.state.fn != "fit":
            return None
        cap = longest_wait(self.trainer.strategy) if self.processes.size > 1 else math.inf
        return Waiting(cap, lambda: self.stop_requested)

    def share(self, questions: Sequence[Question], own: Attempt[list[Rollout]], samples: int) -> list[Group]:
        """Put the rollouts of all processes together."""
        rollouts = own.result or []
        groups = [rollouts[start : start + samples] for start in range(0, len(rollouts), samples)]
        owners = self.processes.owners([question.id for question in questions])
        return self.processes.interleave(Attempt(groups, own.error), owners)

    def logprobs_before(self, batch: RolloutBatch) -> BatchLogprobs:
        """Compute what the ratio and the KL compare with: log-probabilities before the update."""
        settings = (batch, self.micro_batch_tokens, self.temperature, self.processes)
        before = compute_logprobs(self.model, *settings)
        if self.reference is None:
            return before
        with self.reference.model(self.model) as model:
            reference = compute_logprobs(model, *settings)
        return replace(before, reference=reference.policy)

    def update(self, ready: ReadyBatch) -> Metrics:
        """Update the policy on a rollout batch."""
        optimizer = cast("torch.optim.Optimizer", self.optimizers())
        trainee = Trainee(self.model, optimizer, self.descend, self.processes, self.skipped)
        step = self.rollout_step + 1
        try:
            return self.learner.update(trainee, ready, step)
        except NonFiniteStepError as error:
            path = RunFolder(Path(self.trainer.default_root_dir)).nonfinite_step(step)
            # All wait for the file: a process that ends sooner would end the first one too.
            told = self.processes.gather(error.write(path) if self.processes.rank == 0 else "")[0]
            raise UserError(
                f"rollout step {step}: the gradient of {MOST_IN_A_ROW} mini-batches in a row was not finite (the last "
                f"norm is {error.norm}); the last of them {told}: look at it, and resume with a lower "
                f"model.learning_rate (now {self.learner.learning_rate.peak})"
            ) from error

    def descend(self, loss: Tensor, last: bool) -> None:
        """Compute gradients; after the last loss of a mini-batch, processes add theirs up."""
        wait = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        with nullcontext() if last else wait():
            self.manual_backward(loss)

    @property
    def processes(self) -> Processes:
        """Those that train together."""
        return Processes.current()

    @override
    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self._sharded:
            assert self.device_mesh is not None, "the strategy has made it"
            for model in [self.model, *(self.reference.frozen if self.reference else [])]:
                shard(model, self.device_mesh)
            self._sharded = True

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.learner.make_optimizer(self.model)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(exactly(self.model, fn), recurse)  # type: ignore[no-untyped-call]
        return self

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit" and (self.trainer.max_epochs, self.trainer.max_steps) != (-1, -1):
            raise UserError(
                f"trainer.max_epochs is {self.trainer.max_epochs} and trainer.max_steps is {self.trainer.max_steps}; "
                "both must be -1: set model.rollout_steps, which counts what you mean"
            )
        check_precision(self.trainer.precision)
        if stage == "fit":
            adapters = not all(parameter.requires_grad for parameter in self.model.parameters())
            check_rate(self.trainer.precision, adapters, self.learner.learning_rate.peak)
        if stage == "fit" and self.group_size == 1:
            log.warning(
                "model.group_size is 1: the rollouts of a question are compared, and there is nothing to compare"
            )
        check_combination(self.estimator, self.calibrators, self.group_size if stage == "fit" else None)
        self.agent.engine.check()
        check_engine(self.agent)
        check_positions(self.policy, self.agent.protocol.max_rollout_tokens)
        self._engine_is_stale = True  # a checkpoint may be loaded after this, and parameters be sharded
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, QuestionData):
            if stage == "fit" and data.questions_per_step % self.trainer.world_size:
                raise UserError(
                    f"data.questions_per_step is {data.questions_per_step} and there are {self.trainer.world_size} "
                    "processes, which must share the questions evenly; give a multiple"
                )
            asked = data.questions_for(stage)
            for question in sorted(asked, key=lambda question: -len(question.question))[:_PROMPTS_CHECKED]:
                check_prompt(question, self.agent)
        elif stage == "fit" and self.group_filter is not None:
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

        def make() -> list[Rollout]:
            own = self.sample(questions, self.rollout_step, samples=1, temperature=0.0)
            return score_rollouts(own, self.reward)

        groups = self.share(questions, self.processes.attempt(make), samples=1)
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

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        save_identity(checkpoint, self)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_identity(checkpoint, self, self.trainer.state.fn)
        self.rollout_step = checkpoint["rollout_step"]
        self.validated_step = checkpoint["validated_step"]
        self.skipped.in_a_row = checkpoint.get("skipped_in_a_row", 0)  # older checkpoints do not hold it
