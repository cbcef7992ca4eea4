"""The learning rate as a function of the rollout step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The learning rate as a function of the rollout step: the same for all its mini-batches."""

    peak: float
    schedule: Literal["constant", "cosine"]
    warmup_steps: int
    rollout_steps: int

    def at(self, step: int) -> float:
        """Compute the learning rate of a rollout step."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.schedule == "constant":
            return self.peak
        progress = (step - 1 - self.warmup_steps) / max(self.rollout_steps - self.warmup_steps, 1)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
