"""Optimizer steps: the clipped gradient, steps that are skipped, and the metrics of an update."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from calibadv.distributed import ProcessGroup, full_tensor, raising_together, reshard
from calibadv.errors import UserError, one_line
from calibadv.training.logprobs import UpdateBatch
from calibadv.training.minibatches import MicroBatch
from calibadv.types import Metrics

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 3


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that an optimizer changes: all, or those of the adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def clip_gradient(model: nn.Module, max_norm: float) -> float:
    """Scale the gradient down to a norm, 0 for none, and return its norm before; sharded gradients included."""
    reshard(model)
    return float(full_tensor(nn.utils.clip_grad_norm_(trained_parameters(model), max_norm or math.inf)).item())


@dataclass(slots=True)
class UpdateMetrics:
    """Metrics of the optimizer steps of one rollout step."""

    processes: ProcessGroup
    learning_rate: float
    updates: list[Metrics] = field(default_factory=list)  # metrics of each optimizer step that was made
    without_advantage: int = 0  # mini-batches whose advantages are all 0
    skipped: int = 0  # mini-batches whose gradient was not finite
    _sums: Metrics = field(default_factory=dict)

    def add(self, metrics: Metrics, micro_batch: MicroBatch) -> None:
        """Add the metrics of one micro-batch to those of its mini-batch."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * (not micro_batch.is_padding)

    def close(self, norm: float, stepped: bool) -> None:
        """End a mini-batch: sum its metrics over the ranks, and count it."""
        total, self._sums = self.processes.all_reduce_metrics(self._sums), {}
        if stepped:
            self.updates.append({**total, "grad_norm": norm})
        else:
            self.skipped += 1

    def summary(self) -> Metrics:
        """Return the means over the mini-batches; of the KL to the policy before the update, the last and largest."""
        counts = {"stability/skipped_updates": float(self.skipped)} if self.skipped else {}
        counts |= {"credit/tied_updates": float(self.without_advantage), "update/learning_rate": self.learning_rate}
        if not self.updates:
            return counts
        columns: dict[str, list[float]] = {}
        for update in self.updates:
            for name, value in update.items():
                columns.setdefault(name, []).append(value)
        metrics = {f"stability/{name}": sum(column) / len(column) for name, column in columns.items()}
        metrics["update/loss"] = metrics.pop("stability/loss")
        metrics["stability/kl_old"] = columns["kl_old"][-1]
        metrics["stability/grad_norm_max"] = max(columns["grad_norm"])
        return {**counts, **metrics}


@dataclass(slots=True)
class FiniteSteps:
    """Optimizer steps, except those whose gradient is not finite: one of them would make all parameters NaN."""

    skipped_in_a_row: int = 0  # steps skipped since the last one that was made, over rollout steps and resumes
    of_finished_step: int = 0  # the same at the end of the last rollout step, from which a resume goes on

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        norm: float,
        name: str,
        dump: Callable[[], str],
        processes: ProcessGroup,
    ) -> bool:
        """Make an optimizer step, unless the gradient is not finite on some rank.

        Args:
            optimizer: makes it.
            norm: of the gradient.
            name: what to call the step in messages.
            dump: writes the mini-batch to a file, and says where it is.
            processes: the ranks that train together.

        Returns:
            True if the step was made.

        Raises:
            UserError: three steps in a row could not be made.
        """
        if not processes.all_reduce_max(not math.isfinite(norm)):
            optimizer.step()
            self.skipped_in_a_row = 0
            return True
        optimizer.zero_grad()
        self.skipped_in_a_row += 1
        if processes.rank == 0:
            log.warning(
                "%s: the norm of the gradient is %s; no optimizer step is made (%d in a row, at %d the run stops)",
                *(name, norm, self.skipped_in_a_row, MAX_SKIPPED_IN_A_ROW),
            )
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            # All wait for the file: a rank that ends sooner would end the first one too.
            told = processes.gather(dump() if processes.rank == 0 else "")[0]
            with raising_together():
                raise UserError(
                    f"{name}: the gradient of {MAX_SKIPPED_IN_A_ROW} mini-batches in a row was not finite "
                    f"(the last norm is {norm}); the last of them {told}: look at it, and resume with a lower "
                    f"model.learning_rate (now {optimizer.param_groups[0]['lr']})"
                )
        return False


def dump_mini_batch(update: UpdateBatch, rows: list[int], norm: float, path: Path) -> str:
    """Write a mini-batch to a file and say where it is."""
    batch, old = update.batch, update.old
    columns = {
        "token_ids": batch.token_ids,
        "attention_mask": batch.attention_mask,
        "loss_mask": batch.loss_mask,
        "turn_ids": batch.turn_ids,
        "advantages": update.advantages,
        "old_logprobs": old.logprobs,
        **({} if old.reference is None else {"reference_logprobs": old.reference}),
    }
    rollouts = [batch.rollouts[row] for row in rows]
    content: dict[str, object] = {
        "question_ids": [rollout.question.id for rollout in rollouts],
        "samples": [rollout.sample for rollout in rollouts],
        "grad_norm": norm,
        **{name: tensor[rows].cpu() for name, tensor in columns.items()},
    }
    return dump_tensors(content, path)


def dump_tensors(content: Mapping[str, object], path: Path) -> str:
    """Write tensors to a file and say where it is; a disk that is full as well is not why the run stops."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        torch.save(dict(content), partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the second
        return f"could not be written to '{path}' ({one_line(error)})"
    finally:
        partial.unlink(missing_ok=True)
    return f"lies in '{path}'"


def find_non_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Return the name of a parameter or moment that is not finite, None if all are; of shards, this rank's."""
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            return name
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and not _is_finite(value):
                return f"{key} of {name}"
    return None


def _is_finite(tensor: Tensor) -> bool:
    values = tensor.detach()
    return bool((values.to_local() if isinstance(values, DTensor) else values).isfinite().all())
