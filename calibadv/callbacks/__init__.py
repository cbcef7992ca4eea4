"""Lightning callbacks, one per file."""

from calibadv.callbacks.calibration import AdvantageCalibration
from calibadv.callbacks.checkpoint import RolloutCheckpoint
from calibadv.callbacks.collapse_guard import CollapseGuard
from calibadv.callbacks.progress import Progress
from calibadv.callbacks.rollout_writer import RolloutWriter

__all__ = ["AdvantageCalibration", "CollapseGuard", "Progress", "RolloutCheckpoint", "RolloutWriter"]
