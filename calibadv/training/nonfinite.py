"""Numbers that are not finite: optimizer steps that are left out for them, and where they stand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from calibadv.errors import one_line
from calibadv.training.logprobs import ReadyBatch

MOST_IN_A_ROW = 3


@dataclass(slots=True)
class SkippedSteps:
    """How many optimizer steps were left out since the last one that was made, over rollout steps and resumes."""

    in_a_row: int = 0


class NonFiniteStepError(RuntimeError):
    """The gradient was not finite too many times in a row.

    Args:
        ready: the rollout batch as the update saw it.
        rows: its rollouts that are in the last mini-batch.
        norm: of its gradient.
    """

    def __init__(self, ready: ReadyBatch, rows: Sequence[int], norm: float) -> None:
        super().__init__(f"the gradient was not finite in {MOST_IN_A_ROW} mini-batches in a row (norm {norm})")
        self.ready = ready
        self.rows = list(rows)
        self.norm = norm

    def write(self, path: Path) -> str:
        """Write the mini-batch to a file, which appears whole or not at all."""
        batch, before = self.ready.batch, self.ready.before
        columns = {
            "token_ids": batch.token_ids,
            "attention_mask": batch.attention_mask,
            "loss_mask": batch.loss_mask,
            "turn_ids": batch.turn_ids,
            "advantages": self.ready.advantages,
            "old_logprobs": before.policy,
            **({} if before.reference is None else {"reference_logprobs": before.reference}),
        }
        rollouts = [batch.rollouts[row] for row in self.rows]
        content = {
            "question_ids": [rollout.question.id for rollout in rollouts],
            "samples": [rollout.sample for rollout in rollouts],
            "grad_norm": self.norm,
            **{name: tensor[self.rows].cpu() for name, tensor in columns.items()},
        }
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            torch.save(content, partial)
            partial.replace(path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the second
            return f"could not be written to '{path}' ({one_line(error)})"
        finally:
            partial.unlink(missing_ok=True)
        return f"lies in '{path}'"


def non_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Find what would spoil a checkpoint."""
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
