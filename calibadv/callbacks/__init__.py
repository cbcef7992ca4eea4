"""Lightning callbacks, one per file."""

from calibadv.callbacks.calibration import AdvantageCalibration
from calibadv.callbacks.collapse_guard import CollapseGuard

__all__ = ["AdvantageCalibration", "CollapseGuard"]
