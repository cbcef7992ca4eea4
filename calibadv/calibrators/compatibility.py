"""Methods that do not go together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from calibadv.calibrators.answer_rebalance import AnswerRebalance
from calibadv.calibrators.constant_penalty import ConstantPenalty
from calibadv.calibrators.negative_clip import NegativeClip
from calibadv.calibrators.negative_scale import NegativeScale
from calibadv.calibrators.shuffled_penalty import ShuffledPenalty
from calibadv.calibrators.soft_penalty import SoftPenalty
from calibadv.errors import UserError
from calibadv.interfaces import AdvantageEstimator, Calibrator

_PENALTIES = (SoftPenalty, ConstantPenalty, ShuffledPenalty)


def check_combination(
    estimator: AdvantageEstimator, calibrators: Sequence[Calibrator], group_size: int | None = None
) -> None:
    """Refuse an estimator and calibrators whose sum is no method."""
    if group_size == 1 and calibrators:
        name = type(calibrators[0]).__name__
        raise UserError(f"model.group_size is 1, and {name} needs the other rollouts of a group; give at least 2")
    _refuse_doubles(calibrators)
    for calibrator in calibrators:
        if isinstance(calibrator, NegativeScale) and calibrator.match is not None:
            _refuse_beside_match(calibrators)
        if estimator.uses_step_correctness and _uses_evidence(calibrator):
            raise UserError(
                f"{type(estimator).__name__} already gives credit by step correctness, and "
                f"{type(calibrator).__name__} would count it twice; use one of the two (GRPO goes with all calibrators)"
            )


def _refuse_doubles(calibrators: Sequence[Calibrator]) -> None:
    for kind, count in Counter(map(type, calibrators)).items():
        if count > 1:
            raise UserError(f"{kind.__name__} is installed {count} times; keep one")
    softening = [type(calibrator).__name__ for calibrator in calibrators if isinstance(calibrator, _PENALTIES)]
    if len(softening) > 1:
        raise UserError(
            f"{' and '.join(softening)} soften the same searches, one after the other; each stands in the place of the "
            "others: keep one"
        )


def _refuse_beside_match(calibrators: Sequence[Calibrator]) -> None:
    parts = [type(c).__name__ for c in calibrators if isinstance(c, (*_PENALTIES, AnswerRebalance, NegativeClip))]
    if parts:
        raise UserError(
            f"NegativeScale with match calibadv gives the ratio that CalibAdv would, and {' and '.join(parts)} beside "
            "it would count twice, or undo that; keep one of them"
        )


def _uses_evidence(calibrator: Calibrator) -> bool:
    """Whether it is SoftPenalty, or a control of it that takes something from step correctness."""
    if isinstance(calibrator, ConstantPenalty):
        return calibrator.correctness == "batch_mean"
    if isinstance(calibrator, NegativeScale):
        return calibrator.match is not None
    return isinstance(calibrator, SoftPenalty | ShuffledPenalty)
