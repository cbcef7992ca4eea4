"""Sums and means over parts of a batch: groups of rollouts, turns of tokens.

They are taken in float64 on the CPU, wherever the batch is: additions on a GPU come in an order that changes from run
to run, and some accelerators have no float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_sum(values: Tensor, group_ids: Tensor) -> Tensor:
    """Add up the values of each group, in the order of the rows.

    Args:
        values: [B].
        group_ids: [B] group of each row, from 0.

    Returns:
        [number of groups] float64, on the CPU.
    """
    check_shapes("B, B", values, group_ids)
    groups = int(group_ids.max()) + 1
    return torch.zeros(groups, dtype=torch.float64).index_add_(0, group_ids.cpu(), values.cpu().double())


def turn_means(values: Tensor, turn_ids: Tensor, num_turns: int) -> Tensor:
    """Average per-token values over the tokens of each turn.

    Args:
        values: [B, T].
        turn_ids: [B, T] turn of each token, -1 for tokens of none.
        num_turns: K.

    Returns:
        [B, K] float64, on the CPU; 0 for turns without tokens.
    """
    check_shapes("B T, B T", values, turn_ids)
    columns, addends = turn_ids.cpu() + 1, values.cpu().double()  # column 0 collects the tokens of no turn
    zeros = torch.zeros(len(values), num_turns + 1, dtype=torch.float64)
    counts = zeros.scatter_add(1, columns, torch.ones_like(addends))
    return (zeros.scatter_add(1, columns, addends) / counts.clamp(min=1))[:, 1:]


def check_shapes(spec: str, *tensors: Tensor) -> None:
    """Check the shapes of tensors against letters; equal letters stand for equal sizes.

    Args:
        spec: one group of letters per tensor, as in ``"B T, B K, B"``.
        *tensors: the tensors, in the order of ``spec``.

    Raises:
        ValueError: a tensor has another rank, or a letter has two sizes.
    """
    sizes: dict[str, int] = {}
    shapes = [group.split() for group in spec.split(",")]
    assert len(shapes) == len(tensors), f"{len(shapes)} shapes for {len(tensors)} tensors"
    for index, (letters, tensor) in enumerate(zip(shapes, tensors, strict=True)):
        fits = len(letters) == tensor.dim() and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"tensor {index} of [{spec}] has shape {list(tensor.shape)}; known sizes are {sizes}")
