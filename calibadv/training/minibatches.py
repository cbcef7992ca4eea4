"""From calibrated advantages to the gradient: micro-batches, log-probabilities, mini-batches, the loss.

A *mini-batch* is one optimizer step: a block of whole questions. A *micro-batch* is what one forward pass holds:
rollouts up to a budget of tokens. How a mini-batch is cut changes memory and speed, never the result.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from calibadv.batch import RolloutBatch
from calibadv.distributed import Processes
from calibadv.numerics.rng import keyed_uniforms
from calibadv.types import DrawKey


def micro_batches(batch: RolloutBatch, rows: Iterable[int], token_budget: int) -> list[list[int]]:
    """Cut rows into micro-batches, the longest rollouts first, so that little is padded."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    trained = batch.loss_mask.any(dim=1).tolist()
    parts: list[list[int]] = []
    for row in sorted((row for row in rows if trained[row]), key=lambda row: (-lengths[row], row)):
        if parts and lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= token_budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def deal_micro_batches(
    batch: RolloutBatch, rows: Iterable[int], token_budget: int, processes: Processes
) -> list[tuple[list[int], bool]]:
    """Cut rows into micro-batches and deal them out, smaller ones where there would be too few for all processes."""
    rows = list(rows)
    if processes.size > 1:
        tokens = int(batch.attention_mask[rows].sum().item())
        token_budget = min(token_budget, -(-tokens // processes.size))
    return processes.deal(micro_batches(batch, rows, token_budget))


def mini_batches(batch: RolloutBatch, count: int, seed: int, step: int) -> list[list[int]]:
    """Cut a rollout batch into blocks of whole groups, in an order drawn from (seed, step)."""
    groups = batch.group_ids.tolist()
    order = np.argsort(keyed_uniforms(DrawKey(seed, step, "mini-batches", 0, 0), max(groups) + 1), kind="stable")
    trained = batch.loss_mask.any(dim=1).tolist()
    blocks = [
        [row for row, group in enumerate(groups) if group in chosen]
        for chosen in map(set, np.array_split(order, count))
    ]
    return [block for block in blocks if any(trained[row] for row in block)]
