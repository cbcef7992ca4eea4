"""The training loop on rollouts, advantages and models made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from calibadv.batch import RolloutBatch
from calibadv.engines import ScriptedEngine
from calibadv.estimators import GRPO
from calibadv.interfaces import Regularizer
from calibadv.losses import PPOClip
from calibadv.module import SearchAgentModule
from calibadv.rewards.answer import F1
from calibadv.training.logprobs import UpdateBatch
from calibadv.training.minibatches import Batching
from calibadv.types import Metrics
from support.agents import protocol, retriever


@dataclass(frozen=True)
class OneMiniBatch(Batching):
    """Some rows are the only mini-batch."""

    rows: list[int] = field(default_factory=list)

    def blocks(self, batch: RolloutBatch, step: int) -> list[list[int]]:
        return [self.rows]


class HandFed(SearchAgentModule):
    """Begins a step with an update that is given, and ends it with its metrics.

    Attributes:
        given: the update of the next step.
    """

    given: UpdateBatch

    def prepare_update(self, questions: Any, timer: Any) -> tuple[UpdateBatch, Metrics]:
        return self.correct(self.given)

    def finish_step(self, update: UpdateBatch, metrics: Metrics, timer: Any) -> Any:
        return metrics


def module_of(model: nn.Module, *regularizers: Regularizer, root: Path | None = None, **settings: Any) -> HandFed:
    """A module that trains a model, with a trainer and an optimizer, outside of any run."""
    defaults: dict[str, Any] = {"loss": PPOClip(), "learning_rate": 0.1, "clip_norm": 0.0, "micro_batch_tokens": 10_000}
    module = HandFed(
        policy="embedded",
        engine=ScriptedEngine({}),
        retriever=retriever(),
        reward=F1(),
        estimator=GRPO(),
        protocol=protocol(),
        regularizers=list(regularizers),
        **{**defaults, **settings},
    )
    module.model = model
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=root
    )
    module.trainer = trainer
    trainer.strategy.connect(module)
    set_optimizer(module, module.configure_optimizers())
    return module


def set_optimizer(module: HandFed, optimizer: torch.optim.Optimizer) -> None:
    module.trainer.strategy.optimizers = [optimizer]


def update(module: HandFed, batch: UpdateBatch, step: int = 1) -> Metrics:
    """All metrics of one rollout step."""
    module.rollout_step, module.given = step - 1, batch
    metrics: Any = module.training_step([], 0)
    return dict(metrics)


def accumulate(module: HandFed, batch: UpdateBatch, rows: Sequence[int]) -> tuple[Metrics, Tensor]:
    """Metrics of one mini-batch, and all gradients as one vector; the weights stay."""
    kept = module.trainer.strategy.optimizers, module.lr_factor, module.batching
    set_optimizer(module, torch.optim.SGD(module.model.parameters(), lr=0.0))
    module.lr_factor = 0.0
    module.batching = OneMiniBatch(1, module.micro_batch_tokens, module.seed, list(rows))
    module.given = batch
    found: Any = module.training_step([], 0)
    module.trainer.strategy.optimizers, module.lr_factor, module.batching = kept
    metrics = {name.removeprefix("stability/").removeprefix("update/"): value for name, value in found.items()}
    gradients = [p.grad.flatten().clone() for p in module.model.parameters() if p.grad is not None]
    return metrics, torch.cat(gradients)
