"""Advantage calibrators, one per file. The AdvantageCalibration callback installs them."""

from calibadv.calibrators.answer_rebalance import AnswerRebalance
from calibadv.calibrators.soft_penalty import SoftPenalty

__all__ = ["AnswerRebalance", "SoftPenalty"]
