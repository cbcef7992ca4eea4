"""The outcome of a run, defined once for every table, report and alarm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

_FINAL_EVALUATIONS = 3
DROP = 0.2
_LEAST_VALID = 0.5
# 0.85 - 0.2 is 0.6499999999999999 in floats; a fall from 0.85 to 0.65 is one of 0.2 all the same.
ROUNDING = 1e-9


def final_validations(validations: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The validations that the final F1 of a run is the mean of."""
    trained = [row for row in validations if row["step"] > 0]
    return list(trained or validations)[-_FINAL_EVALUATIONS:]


def outcome(validations: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Sum up the validations of a run."""
    rows = [row for row in validations if "f1" in row]
    if not rows:
        return {}
    scores = [row["f1"] for row in rows]
    last = [row["f1"] for row in final_validations(rows)]
    final = sum(last) / len(last)
    best_so_far = accumulate(scores, max)
    fallen = [score <= best - DROP + ROUNDING for score, best in zip(scores, best_so_far, strict=True)]
    still_up = max((index for index, down in enumerate(fallen) if not down), default=-1)
    return {
        "best_f1": max(scores),
        "final_f1": final,
        "collapsed": final <= max(scores) - DROP + ROUNDING or rows[-1]["format_valid"] < _LEAST_VALID,
        "step_of_collapse": rows[still_up + 1]["step"] if still_up + 1 < len(rows) else None,
    }
