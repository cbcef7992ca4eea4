"""Mini-batches and micro-batches of a rollout batch.

A *mini-batch* is one optimizer step: a block of whole questions. A *micro-batch* is one forward pass: rollouts up to a
budget of tokens. How a mini-batch is cut into micro-batches changes memory and speed, never the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from calibadv.batch import RolloutBatch
from calibadv.distributed import ProcessGroup
from calibadv.numerics.rng import keyed_uniforms
from calibadv.types import DrawKey


@dataclass(frozen=True, slots=True)
class LossNormalizer:
    """Denominators of the sums of a mini-batch, over all ranks."""

    tokens: float  # trained tokens, those without advantage included
    rollouts: int  # rollouts with a trained token

    @staticmethod
    def from_rows(batch: RolloutBatch, rows: Sequence[int]) -> LossNormalizer:
        """Count the trained tokens and rollouts of some rows."""
        trained: list[int] = batch.loss_mask[rows].sum(dim=1).tolist()
        return LossNormalizer(float(sum(trained)), sum(tokens > 0 for tokens in trained))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rollouts of one forward pass."""

    rows: list[int]  # rows of the rollout batch
    is_padding: bool  # whether it is only there to keep the collectives of the ranks in step, and contributes nothing
    needs_grad: bool  # whether it has a gradient; the others are passed through the model for metrics only
    is_last: bool  # whether it is the last with a gradient in its mini-batch, after which the ranks add theirs up
    loss_scale: float  # number of ranks, since these take the mean of gradients that are parts of one sum; 0 if padding


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The rollouts of one optimizer step."""

    name: str  # what to call it in messages
    rows: list[int]  # rows of the rollout batch, those of all ranks
    size: LossNormalizer  # denominators of its sums
    micro_batches: list[MicroBatch]  # the forward passes of this rank, those with a gradient first
    has_advantage: bool  # whether any of its advantages is not 0


def mini_batches(batch: RolloutBatch, count: int, seed: int, step: int) -> list[list[int]]:
    """Cut a rollout batch into blocks of whole groups, in an order drawn from (seed, step).

    Args:
        batch: B rollouts.
        count: number of blocks; with fewer groups there are fewer blocks.
        seed: seed of the run.
        step: rollout step.

    Returns:
        Rows of each block; blocks without a trained token are left out.
    """
    groups = batch.group_ids.tolist()
    order = np.argsort(keyed_uniforms(DrawKey(seed, step, "mini-batches", 0, 0), max(groups) + 1), kind="stable")
    trained = batch.loss_mask.any(dim=1).tolist()
    blocks = [
        [row for row, group in enumerate(groups) if group in chosen]
        for chosen in map(set, np.array_split(order, count))
    ]
    return [block for block in blocks if any(trained[row] for row in block)]


def micro_batches(batch: RolloutBatch, rows: Iterable[int], token_budget: int) -> list[list[int]]:
    """Cut rows into micro-batches, the longest rollouts first, so that little is padded.

    Args:
        batch: B rollouts.
        rows: rows to cut; rollouts without a trained token are left out.
        token_budget: the most tokens of a micro-batch, padding included; a longer rollout is one of its own.

    Returns:
        Rows of each micro-batch; a rollout is never split.
    """
    lengths = batch.attention_mask.sum(dim=1).tolist()
    trained = batch.loss_mask.any(dim=1).tolist()
    parts: list[list[int]] = []
    for row in sorted((row for row in rows if trained[row]), key=lambda row: (-lengths[row], row)):
        if parts and lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= token_budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def partition_micro_batches(
    batch: RolloutBatch, rows: Iterable[int], token_budget: int, processes: ProcessGroup
) -> list[tuple[list[int], bool]]:
    """Cut rows into micro-batches and return this rank's, smaller ones where there would be too few for all ranks.

    Of each it says whether it is padding (see ``ProcessGroup.partition``).
    """
    rows = list(rows)
    if processes.size > 1:
        tokens = int(batch.attention_mask[rows].sum().item())
        token_budget = min(token_budget, -(-tokens // processes.size))
    return processes.partition(micro_batches(batch, rows, token_budget))


@dataclass(frozen=True, slots=True)
class Batching:
    """Sizes of mini-batches and micro-batches, and the seed of their order."""

    mini_batches: int
    micro_batch_tokens: int
    seed: int

    def cut(
        self, batch: RolloutBatch, advantages: Tensor, step: int, grad_without_advantage: bool, processes: ProcessGroup
    ) -> list[MiniBatch]:
        """Cut a rollout batch into the mini-batches of its optimizer steps.

        Args:
            batch: B rollouts.
            advantages: [B, T] after calibration.
            step: rollout step, which the order depends on.
            grad_without_advantage: whether a KL or another term pulls on tokens whose advantage is 0.
            processes: the ranks that share the work.

        Returns:
            The mini-batches, each with the micro-batches of this rank.
        """
        blocks = self.blocks(batch, step)
        nonzero = advantages.any(dim=1).tolist()
        return [
            MiniBatch(
                name=f"rollout step {step}, mini-batch {number} of {len(blocks)}",
                rows=rows,
                size=LossNormalizer.from_rows(batch, rows),
                micro_batches=self._micro_batches(batch, rows, nonzero, grad_without_advantage, processes),
                has_advantage=any(nonzero[row] for row in rows),
            )
            for number, rows in enumerate(blocks, 1)
        ]

    def blocks(self, batch: RolloutBatch, step: int) -> list[list[int]]:
        """Return the rows of each mini-batch."""
        return mini_batches(batch, self.mini_batches, self.seed, step)

    def _micro_batches(
        self,
        batch: RolloutBatch,
        rows: Sequence[int],
        has_advantage: Sequence[bool],
        grad_without_advantage: bool,
        processes: ProcessGroup,
    ) -> list[MicroBatch]:
        """Cut a mini-batch into the micro-batches of this rank, those with a gradient first.

        Where the advantages of a rollout are all 0, as in a group with equal rewards, the gradient of the policy loss
        is exactly 0, and its backward pass is left out. A mini-batch without any advantage keeps all backward passes,
        so that its gradient is 0 and not missing: to AdamW that is a difference.
        """
        with_grad = [row for row in rows if has_advantage[row]]
        if grad_without_advantage or not with_grad:
            with_grad = list(rows)
        without = [row for row in rows if row not in set(with_grad)]
        moving = partition_micro_batches(batch, with_grad, self.micro_batch_tokens, processes)
        still = partition_micro_batches(batch, without, self.micro_batch_tokens, processes)
        size = float(processes.size)
        return [
            *(
                MicroBatch(part, pad, True, i == len(moving), 0.0 if pad else size)
                for i, (part, pad) in enumerate(moving, 1)
            ),
            *(MicroBatch(part, pad, False, is_last=False, loss_scale=0.0) for part, pad in still),
        ]
