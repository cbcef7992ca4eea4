"""Installs the method under comparison."""

from __future__ import annotations

from typing import Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from calibadv.errors import UserError
from calibadv.interfaces import Calibrator


class _Calibrated(Protocol):
    calibrators: list[Calibrator]


class AdvantageCalibration(Callback):
    """Install advantage calibrators on the module. Leave it out to train plain GRPO.

    Args:
        calibrators: Rules applied to the advantages before the loss, in this order.
    """

    def __init__(self, calibrators: list[Calibrator]) -> None:
        self.calibrators = calibrators

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module = cast(_Calibrated, pl_module)
        if module.calibrators and module.calibrators is not self.calibrators:
            raise UserError(
                "trainer.callbacks holds two AdvantageCalibration callbacks; keep one and list all calibrators in it, "
                "as configs/calibrators/calibadv.yaml does"
            )
        module.calibrators = self.calibrators
