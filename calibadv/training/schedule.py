"""The learning rate as a function of the rollout step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


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
