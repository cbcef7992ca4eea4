"""Replay: apply methods to recorded rollouts without a model, and compare the advantages that they give."""

from calibadv.analysis.replay.arms import ReplayArm, load_arms
from calibadv.analysis.replay.command import replay
from calibadv.analysis.replay.comparison import Comparison
from calibadv.analysis.replay.method import Method, apply_method, load_method
from calibadv.analysis.replay.recording import RecordedRollouts

__all__ = [
    "Comparison",
    "Method",
    "RecordedRollouts",
    "ReplayArm",
    "apply_method",
    "load_arms",
    "load_method",
    "replay",
]
