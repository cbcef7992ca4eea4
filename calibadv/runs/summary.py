"""The outcome of a run, defined once for every table, report and alarm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_FINAL_EVALUATIONS = 3
DROP = 0.2
_LEAST_VALID = 0.5
# 0.85 - 0.2 is 0.6499999999999999 in floats; a fall from 0.85 to 0.65 is one of 0.2 all the same.
ROUNDING = 1e-9


def final_validations(validations: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The validations that the final F1 of a run is the mean of.

    Args:
        validations: of a run, in order.

    Returns:
        The last three. That of the policy before training is among them only where there is no other: in a short run
        it would count what training has not done.
    """
    trained = [row for row in validations if row["step"] > 0]
    return list(trained or validations)[-_FINAL_EVALUATIONS:]


def outcome(validations: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Sum up the validations of a run.

    Args:
        validations: ``step``, ``f1`` (greedy, gated) and ``format_valid`` of each, in order; the first is that of the
            policy before training.

    Returns:
        ``best_f1``; ``final_f1``, the mean of ``final_validations``; ``collapsed``, whether the final F1 is at least
        0.2 below the best, or less than half of the last answers are valid; and ``step_of_collapse``, the first step
        from which F1 stays 0.2 below the best so far, or None. Empty without a validation.
    """
    rows = [row for row in validations if "f1" in row]
    if not rows:
        return {}
    scores = [row["f1"] for row in rows]
    last = [row["f1"] for row in final_validations(rows)]
    final = sum(last) / len(last)
    fallen = [score <= max(scores[: place + 1]) - DROP + ROUNDING for place, score in enumerate(scores)]
    still_up = max((place for place, down in enumerate(fallen) if not down), default=-1)
    return {
        "best_f1": max(scores),
        "final_f1": final,
        "collapsed": final <= max(scores) - DROP + ROUNDING or rows[-1]["format_valid"] < _LEAST_VALID,
        "step_of_collapse": rows[still_up + 1]["step"] if still_up + 1 < len(rows) else None,
    }
