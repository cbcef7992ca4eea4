"""The policy in the hands of Lightning: sharding, precision, optimizers and checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from calibadv.distributed import apply_fsdp
from calibadv.errors import UserError
from calibadv.policy.policy import Policy
from calibadv.policy.precision import exactly
from calibadv.policy.reference import Reference
from calibadv.training.checkpoint_compat import RunIdentity, check_optimizer, check_steps_left, check_weights
from calibadv.training.evaluation import EvaluationModule
from calibadv.training.optimization import FiniteSteps, trained_parameters


class PolicyModule(EvaluationModule):
    """The half of a LightningModule that holds a policy and what is saved of it."""

    policy: Policy
    model: torch.nn.Module  # that of the policy, whose parameters are trained
    reference: Reference | None  # None without a KL
    rollout_steps: int  # of the whole run
    make_optimizer: OptimizerCallable
    make_scheduler: LRSchedulerCallable | None
    schedule: Schedule
    first_stage: str = "rollouts"  # of a training step, for the display
    lr_factor: float = 1.0  # of all learning rates, lowered by a guard
    config: str = ""  # the resolved config of a run of the command line, as YAML

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.finite_steps = FiniteSteps()
        self._sharded = False
        self._peaks: list[float] = []
        self.finished_step = 0  # the last one whose curves and rollout file are written
        self.mid_update = False

    @override
    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self._sharded:
            assert self.device_mesh is not None, "the strategy has made it"
            for model in [self.model, *(self.reference.frozen if self.reference else [])]:
                apply_fsdp(model, self.device_mesh)
            self._sharded = True

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(trained_parameters(self.model))
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise UserError("model.lr_scheduler is ReduceLROnPlateau, which needs a metric; give another one")
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def start_update(self) -> torch.optim.Optimizer:
        """Return the optimizer, with the learning rates of the rollout step that is made."""
        optimizer, scheduler = cast("torch.optim.Optimizer", self.optimizers()), self.lr_schedulers()
        rates: list[Any] = [self.schedule.at(self.rollout_step + 1, peak) for peak in self._peaks]
        if isinstance(scheduler, LRScheduler):
            rates = scheduler.get_last_lr()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = self.lr_factor * rate
        return optimizer

    def gradient_sync(self, last: bool) -> AbstractContextManager[None]:
        """Sum gradients over the ranks only after the last backward pass of a mini-batch."""
        wait = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        return nullcontext() if last else wait()

    def finish_update(self) -> None:
        """Count a rollout step, and advance the scheduler, from its own rates and not from slowed ones."""
        self.sampler.engine_is_stale = True
        self.rollout_step += 1
        self.finite_steps.of_finished_step = self.finite_steps.skipped_in_a_row
        self.mid_update = False
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, LRScheduler):
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
            scheduler.step()

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.mid_update = True

    @override
    def on_train_start(self) -> None:
        self.finished_step = self.rollout_step
        done = self.rollout_step >= self.rollout_steps  # killed before what follows the last step
        is_due = self.validation_is_due(self.rollout_step) or (done and self.trainer.enable_validation)
        if is_due and self.validated_step != self.rollout_step:
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True
        if done:
            self.trainer.should_stop = True

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(exactly(self.model, fn), recurse)  # type: ignore[no-untyped-call]
        return self

    @override
    def on_fit_start(self) -> None:
        if self.reference is not None:
            self.reference.to(self.device, next(self.model.parameters()).dtype)

    @property
    def identity(self) -> RunIdentity:
        """The settings that tell this run from another: written into its checkpoints."""
        return RunIdentity(
            seed=self.seed,
            protocol=self.sampler.agent.protocol.settings(),
            reference=None if self.reference is None else self.reference.digest,
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= self.identity.to_checkpoint()
        checkpoint["rollout_step"] = self.rollout_step
        checkpoint["validated_step"] = self.validated_step
        checkpoint["skipped_in_a_row"] = self.finite_steps.of_finished_step
        if self.config:
            checkpoint["config"] = self.config

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
        skipped = checkpoint.get("skipped_in_a_row", 0)  # older checkpoints do not hold it
        self.finite_steps = FiniteSteps(skipped, skipped)

    @classmethod
    @override
    def load_from_checkpoint(  # type: ignore[override]  # the base has options for pickled hyperparameters
        cls, checkpoint_path: str | os.PathLike[str], map_location: Any = "cpu", **arguments: Any
    ) -> Self:
        path = Path(checkpoint_path)
        if path.is_dir():
            raise UserError(f"checkpoint '{path}' is sharded; load it with calibadv validate, --config cluster/fsdp")
        content: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        if not arguments and "config" not in content:
            raise UserError(
                f"checkpoint '{path}' holds no config, since its module was built in Python; give the arguments of its "
                "constructor"
            )
        module = cls(**arguments) if arguments else _from_config(cls, yaml.safe_load(content["config"])["model"])
        check_weights(content["state_dict"], module.state_dict())
        module.load_state_dict(content["state_dict"])
        module.rollout_step = content["rollout_step"]
        return module


def _from_config(cls: type[Any], settings: dict[str, Any]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "model")
    return parser.instantiate_classes(parser.parse_object({"model": settings})).model


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up, then a constant rate or half a cosine: the same for all mini-batches of a rollout step."""

    kind: Literal["constant", "cosine"]
    warmup_steps: int
    rollout_steps: int

    def at(self, step: int, peak: float) -> float:
        """Compute the learning rate of a rollout step, from 1."""
        if step <= self.warmup_steps:
            return peak * step / self.warmup_steps
        if self.kind == "constant":
            return peak
        progress = (step - 1 - self.warmup_steps) / max(self.rollout_steps - self.warmup_steps, 1)
        return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
