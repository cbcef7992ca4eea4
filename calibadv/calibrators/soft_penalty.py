"""Soften the penalty of searches that found evidence."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.calibrators._penalty import find_punished, soften_searches
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
        return soften_searches(advantages, batch.step_correctness, find_punished(batch, advantages))
