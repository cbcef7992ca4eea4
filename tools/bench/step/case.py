"""One row of bench.py: a random model, and the code of a training step without the Lightning trainer."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch

from calibadv.agent.rollout import Draws, run_rollouts
from calibadv.batch import RolloutBatch, collate, to_device
from calibadv.calibrators import AnswerRebalance, SoftPenalty
from calibadv.engines import TransformersEngine, VLLMEngine
from calibadv.estimators import GRPO
from calibadv.interfaces import Engine
from calibadv.losses import PPOClip
from calibadv.module import SearchAgentModule
from calibadv.planning.job import GPUS, PRECISIONS, Assumptions, Job, Sampler
from calibadv.planning.model_shape import read_shape
from calibadv.planning.time import decode_seconds, pass_flops
from calibadv.policy.loading import enable_checkpointing
from calibadv.rewards import F1
from calibadv.rewards.evidence import credit_rollouts
from calibadv.training.logprobs import BatchLogprobs, UpdateBatch, compute_logprobs
from calibadv.training.metrics import Stopwatch
from calibadv.types import Metrics, Rollout
from tools.bench.step.random_agent import Episodes, PeakMemory, graded, random_agent, random_questions, written_rollouts

WARM_UP = 2
STAGES = ("rollout", "calibration", "logprobs", "update")


@dataclass(frozen=True)
class Case:
    """One row of the table. ``shape`` is ``embedded``, or one of ``SHAPES``; ``update_only`` samples nothing."""

    shape: str
    engine: str = "transformers"
    precision: str = "32-true"
    micro_batch_tokens: int = 4096
    checkpointing: bool = False
    questions: int = 8
    group_size: int = 5
    episodes: Episodes = field(default_factory=Episodes)
    steps: int = 5
    configs: tuple[str, ...] = ()
    update_only: bool = False


class _Update(SearchAgentModule):
    """The update of a training step, on a batch that is given."""

    given: UpdateBatch

    def prepare_update(self, questions: Any, timer: Any) -> tuple[UpdateBatch, Metrics]:
        """Return what is given."""
        return self.given, {}

    def finish_step(self, update: UpdateBatch, metrics: Metrics, timer: Any) -> Any:
        """Log nothing."""

    def update(self, batch: UpdateBatch) -> None:
        """Update the policy on a batch."""
        self.given = batch
        self.training_step([], 0)


class Bench:
    """One model, and the stages of a step with it."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.device = device
        engine: Engine = VLLMEngine(dtype="bfloat16") if case.engine == "vllm" else TransformersEngine()
        self.policy, self.agent = random_agent(case.shape, case.episodes, engine, device)
        self.shape = read_shape(self.policy.model)
        if case.checkpointing:
            enable_checkpointing(self.policy)
        self.questions = random_questions(case.questions, case.episodes)
        self.module = _Update(
            policy="embedded",
            engine=engine,
            reward=F1(),
            estimator=GRPO(),
            loss=PPOClip(),
            tools=self.agent.environment.tools,
            micro_batch_tokens=case.micro_batch_tokens,
        )
        self.module.model = self.policy.model
        trainer = pl.Trainer(accelerator="cuda" if device == "cuda" else "cpu", devices=1, logger=False)
        self.module.trainer = trainer
        trainer.strategy.connect(self.module)
        trainer.strategy.optimizers = [self.module.configure_optimizers()]

    def step(self, number: int) -> dict[str, float]:
        """Make one step; seconds by stage, and tokens."""
        clock = Stopwatch()
        with self._autocast():
            with clock.measure("rollout"):
                draws = Draws(seed=0, step=number, samples=self.case.group_size, temperature=1.0)
                rollouts = graded(run_rollouts(self.questions, self.agent, draws))
                self._wait()
            with clock.measure("calibration"):
                batch, advantages = self._calibrate(rollouts)
                self._wait()
            with clock.measure("logprobs"):
                before = compute_logprobs(self.policy.model, batch, self.case.micro_batch_tokens, 1.0)
                self._wait()
            with clock.measure("update"):
                self.module.update(UpdateBatch(batch, advantages, advantages, before))
                self.agent.engine.sync(self.policy)
                self._wait()
        tokens = batch.loss_mask.sum().item()
        return {**clock.seconds, "tokens": tokens, "read": batch.attention_mask.sum().item()}

    def measure(self) -> dict[str, float]:
        """Warm up and measure; medians over the steps, and the peak over all of them."""
        with PeakMemory(self.device) as memory:
            self.agent.engine.sync(self.policy)
            steps = [self.step(number) for number in range(1, self.case.steps + WARM_UP + 1)]
        found = {**medians(steps[WARM_UP:]), "peak": memory.peak}
        return {**found, **self._shares(found)}

    def measure_update(self) -> dict[str, float]:
        """The peak of one update on rollouts that no model has sampled, and what was held before it."""
        case = self.case
        ready = self._written(case.questions)
        with self._autocast():
            self.module.update(self._written(1))  # the optimizer makes its averages
            gc.collect()
            with PeakMemory(self.device) as memory:
                self.module.update(ready)
        return {"before": memory.before, "peak": memory.peak}

    def _written(self, questions: int) -> UpdateBatch:
        case = self.case
        written = written_rollouts(questions, case.group_size, case.episodes, self.shape.vocabulary, think=10)
        batch, advantages = self._calibrate(graded(written))
        old = BatchLogprobs(batch.sampled_logprobs, torch.zeros_like(advantages))
        return UpdateBatch(batch, advantages, advantages, old)

    def _calibrate(self, rollouts: list[Rollout]) -> tuple[RolloutBatch, torch.Tensor]:
        batch = to_device(collate(credit_rollouts(rollouts)), torch.device(self.device))
        advantages = GRPO().estimate(batch)
        for calibrator in (SoftPenalty(), AnswerRebalance()):
            advantages, _ = calibrator.calibrate(batch, advantages)
        return batch, advantages

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """As Lightning's bf16-mixed has it."""
        mixed = self.case.precision == "bf16-mixed"
        with torch.autocast(self.device, torch.bfloat16, cache_enabled=False) if mixed else nullcontext():
            yield

    def _shares(self, found: dict[str, float]) -> dict[str, float]:
        """On a known GPU: model FLOP utilisation of the update, and decoding beside what its memory allows."""
        name = torch.cuda.get_device_name().lower() if self.device == "cuda" else ""
        gpu = next((gpu for key, gpu in GPUS.items() if key in name), None)
        if gpu is None:
            return {}
        case = self.case
        rollouts = case.questions * case.group_size
        sampler = Sampler("vllm" if case.engine == "vllm" else "transformers")
        job = Job(
            shape=self.shape,
            trained=self.shape.parameters,
            gpu=gpu,
            precision=PRECISIONS[case.precision],
            sampler=sampler,
            questions=case.questions,
            group_size=case.group_size,
            max_rollout_tokens=self.agent.protocol.max_rollout_tokens,
            mean_rollout_tokens=round(found["read"] / rollouts),
            mean_policy_tokens=round(found["tokens"] / rollouts),
            max_turns=case.episodes.turns,
            assumed=Assumptions(mfu=1.0, bandwidth_share=1.0, launch_seconds=0.0),
        )
        # Without what checkpointing computes twice: utilisation counts useful operations.
        used = pass_flops(job, backward=True) / job.peak_flops / found["update"]
        return {"mfu": used, "decode": found["rollout"] / decode_seconds(job, rollouts, rollouts)}


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of every number over the steps, and of the sum of the stages."""
    found = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    return {**found, "step": statistics.median(sum(step[stage] for stage in STAGES) for step in steps)}
