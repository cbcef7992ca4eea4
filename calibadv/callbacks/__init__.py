"""Lightning callbacks, one per file."""

from calibadv.callbacks.calibration import AdvantageCalibration

__all__ = ["AdvantageCalibration"]
