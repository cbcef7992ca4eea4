"""A control of SoftPenalty: one correctness for all searches, whatever they found."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.calibrators._penalty import apply_soft_penalty, find_negative_turns
from calibadv.errors import UserError
from calibadv.interfaces import Calibrator
from calibadv.types import Metrics


class ConstantPenalty(Calibrator):
    """Multiply the advantage of every penalized search turn by the same (1 - correctness): a control of SoftPenalty.

    With ``batch_mean`` the constant is the mean step correctness of the penalized search turns of the batch. Then the
    mean softening of a turn is that of SoftPenalty, step by step, and the answer turns keep their advantages; what is
    gone is which turn found evidence. What SoftPenalty gains beyond this control is due to the evidence.

    Args:
        correctness: Taken for that of all penalized search turns: in [0, 1], or ``batch_mean``.
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
        negative = find_negative_turns(batch, advantages)
        if not negative.searches.any():
            return advantages, {}
        constant = self.correctness
        if constant == "batch_mean":
            constant = float(batch.step_correctness[negative.searches].cpu().double().mean())
        correctness = torch.where(negative.searches, constant, torch.zeros_like(batch.step_correctness))
        scaled, metrics = apply_soft_penalty(advantages, correctness, negative)
        return scaled, {**metrics, "credit/constant_correctness": constant}
