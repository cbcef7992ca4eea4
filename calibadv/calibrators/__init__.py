"""Advantage calibrators, one per file. The AdvantageCalibration callback installs them."""

from calibadv.calibrators.answer_rebalance import AnswerRebalance
from calibadv.calibrators.compatibility import check_combination
from calibadv.calibrators.constant_penalty import ConstantPenalty
from calibadv.calibrators.negative_clip import NegativeClip
from calibadv.calibrators.negative_scale import NegativeScale
from calibadv.calibrators.shuffled_penalty import ShuffledPenalty
from calibadv.calibrators.soft_penalty import SoftPenalty

__all__ = [
    "AnswerRebalance",
    "ConstantPenalty",
    "NegativeClip",
    "NegativeScale",
    "ShuffledPenalty",
    "SoftPenalty",
    "check_combination",
]
