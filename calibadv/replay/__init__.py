"""Apply methods to recorded rollouts, without a model: from their text to advantages, and how methods differ."""

from calibadv.replay.arms import ReplayArm, load_arms
from calibadv.replay.command import replay
from calibadv.replay.comparison import Comparison
from calibadv.replay.figures import ArmFigures, Disagreement, DisputedTurn, Figures
from calibadv.replay.method import Method, Outcome, apply_method, load_method
from calibadv.replay.recorded import Recorded, read_recorded

__all__ = [
    "ArmFigures",
    "Comparison",
    "Disagreement",
    "DisputedTurn",
    "Figures",
    "Method",
    "Outcome",
    "Recorded",
    "ReplayArm",
    "apply_method",
    "load_arms",
    "load_method",
    "read_recorded",
    "replay",
]
