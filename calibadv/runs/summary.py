"""Summary of a run by its validations: best and final F1, and collapse; used by every table, report and alarm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_FINAL_EVALUATIONS = 3
DROP = 0.2
_LEAST_VALID = 0.5
# 0.85 - 0.2 is 0.6499999999999999 in floats, and a fall from 0.85 to 0.65 shall count as one of 0.2.
ROUNDING = 1e-9


def final_validations(validations: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the validations whose mean is the final F1 of a run."""
    trained = [row for row in validations if row["step"] > 0]
    return list(trained or validations)[-_FINAL_EVALUATIONS:]


def summarize_run(validations: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return best and final F1, and if and when the run collapsed; empty without a validation."""
    rows = [row for row in validations if "f1" in row]
    if not rows:
        return {}
    best = max(row["f1"] for row in rows)
    last = [row["f1"] for row in final_validations(rows)]
    final = sum(last) / len(last)
    return {
        "best_f1": best,
        "final_f1": final,
        "collapsed": _has_fallen(final, best) or rows[-1]["format_valid"] < _LEAST_VALID,
        "step_of_collapse": _step_of_collapse(rows),
    }


def _step_of_collapse(rows: Sequence[Mapping[str, float]]) -> float | None:
    """Return the first step from which on F1 stays below the best so far."""
    step, best = None, -1.0
    for row in rows:
        best = max(best, row["f1"])
        if not _has_fallen(row["f1"], best):
            step = None
        elif step is None:
            step = row["step"]
    return step


def _has_fallen(score: float, best: float) -> bool:
    return score <= best - DROP + ROUNDING
