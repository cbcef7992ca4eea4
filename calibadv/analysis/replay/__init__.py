"""Apply methods to recorded rollouts, without a model: from their text to advantages, and how methods differ."""

from calibadv.analysis.replay.arms import ReplayArm, load_arms
from calibadv.analysis.replay.command import replay
from calibadv.analysis.replay.comparison import Comparison
from calibadv.analysis.replay.method import Method, Outcome, apply_method, load_method
from calibadv.analysis.replay.recording import Recorded, read_recorded
from calibadv.analysis.replay.results import ArmFigures, Disagreement, DisputedTurn, Figures

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
