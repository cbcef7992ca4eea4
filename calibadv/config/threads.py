"""CPU threads: no more than help a small model, and none that waits at work."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_THREADS = "OMP_NUM_THREADS"
# Two threads were no faster than one with 4 million parameters, and a little with 20 million (docs/performance.md).
_SMALL_MODEL = 10_000_000


def sleep_while_waiting() -> None:
    """Let OpenMP's threads sleep where they would spin, which takes other processes' time; before torch is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def limit_threads(model: nn.Module) -> None:
    """Compute with one thread if the model is small, unless OMP_NUM_THREADS is set.

    The number of threads changes the order of additions, and so what is sampled: with one, the results of a small model
    do not depend on how many cores a machine has.
    """
    import torch

    if _THREADS not in os.environ and sum(parameter.numel() for parameter in model.parameters()) < _SMALL_MODEL:
        torch.set_num_threads(1)
        os.environ[_THREADS] = "1"  # for the further processes of a strategy, which Lightning would give all cores
