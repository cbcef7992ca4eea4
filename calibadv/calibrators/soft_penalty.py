"""Reduce the penalty of searches that found evidence."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.calibrators._penalty import apply_soft_penalty, find_negative_turns
from calibadv.interfaces import Calibrator
from calibadv.types import Metrics


class SoftPenalty(Calibrator):
    """Multiply the advantage of search turn t, where it is negative, by (1 - step correctness of t).

    The first part of CalibAdv (arXiv 2604.18235). The answer turn keeps its advantage.
    """

    uses_step_correctness = True
    roles = frozenset({"search penalty"})

    @override
    def calibrate(self, batch: RolloutBatch, advantages: Tensor) -> tuple[Tensor, Metrics]:
        return apply_soft_penalty(advantages, batch.step_correctness, find_negative_turns(batch, advantages))
