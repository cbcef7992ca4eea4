"""Checks for estimators and calibrators that do not go together: by what they say of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from calibadv.errors import UserError
from calibadv.interfaces import AdvantageEstimator, Calibrator


def check_combination(
    estimator: AdvantageEstimator, calibrators: Sequence[Calibrator], group_size: int | None = None
) -> None:
    """Refuse an estimator and calibrators whose sum is no method."""
    if group_size == 1 and calibrators:
        name = type(calibrators[0]).__name__
        raise UserError(f"model.group_size is 1, and {name} needs the other rollouts of a group; give at least 2")
    for kind, count in Counter(map(type, calibrators)).items():
        if count > 1:
            raise UserError(f"{kind.__name__} is installed {count} times; keep one")
    for first, second in combinations(calibrators, 2):
        shared = ", ".join(sorted(first.roles & second.roles))
        if shared:
            raise UserError(
                f"{type(first).__name__} and {type(second).__name__} share a role ({shared}), so one would undo or "
                "repeat the other: keep one"
            )
    for calibrator in calibrators:
        if estimator.uses_step_correctness and calibrator.uses_step_correctness:
            raise UserError(
                f"{type(estimator).__name__} already gives credit by step correctness, and "
                f"{type(calibrator).__name__} would count it twice; use one of the two (GRPO goes with all calibrators)"
            )
