"""A control of SoftPenalty: soften all searches alike, without looking at what they found."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.calibrators._penalty import find_punished, soften_searches
from calibadv.errors import UserError
from calibadv.interfaces import Calibrator
from calibadv.numerics.credit import mean_over
from calibadv.types import Metrics


class ConstantPenalty(Calibrator):
    """Multiply the advantage of every punished search turn by the same (1 - correctness): a control of SoftPenalty.

    With ``batch_mean`` the constant is the mean step correctness of the punished search turns of the batch. Then the
    mean softening of a turn is that of SoftPenalty, step by step, and the answer turns keep their advantages; what is
    gone is which turn found evidence. What SoftPenalty gains beyond this control is due to the evidence.

    Args:
        correctness: Taken for that of all punished search turns: in [0, 1], or ``batch_mean``.
    """

    roles = frozenset({"search penalty"})

    def __init__(self, correctness: float | Literal["batch_mean"] = "batch_mean") -> None:
        if correctness != "batch_mean" and not 0 <= correctness <= 1:
            raise UserError(f"correctness is {correctness}; it must be a number from 0 to 1, or batch_mean")
        self.correctness = correctness

    @property
    @override
    def uses_step_correctness(self) -> bool:  # type: ignore[override]
        return self.correctness == "batch_mean"

    @override
    def calibrate(self, batch: RolloutBatch, advantages: Tensor) -> tuple[Tensor, Metrics]:
        punished = find_punished(batch, advantages)
        if not punished.searches.any():
            return advantages, {}
        constant = (
            mean_over(batch.step_correctness, punished.searches)
            if self.correctness == "batch_mean"
            else self.correctness
        )
        correctness = torch.where(punished.searches, constant, torch.zeros_like(batch.step_correctness))
        softened, metrics = soften_searches(advantages, correctness, punished)
        return softened, {**metrics, "credit/constant_correctness": constant}
