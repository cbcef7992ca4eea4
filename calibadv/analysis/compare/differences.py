"""Paired differences of arms, and verdicts on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibadv.analysis.compare.arms import Arm
from calibadv.analysis.compare.runs import Run
from calibadv.analysis.compare.scores import RunScores
from calibadv.analysis.statistics import Floats, bootstrap_complete_cases, holm_correction, sign_flip_test, smallest_p
from calibadv.runs.summary import final_validations

DIGITS = 6  # of every fraction in results.json
_SIGNIFICANT = 0.05
_PAIRED = ("final_f1", "final_em")


@dataclass(frozen=True, slots=True)
class ArmScores:
    """The finished runs of an arm."""

    runs: tuple[RunScores, ...]  # [S] in the order of their seeds
    questions: tuple[str, ...]  # [Q] identities of the questions that all of them answered; empty if they are not known
    reason: str  # the reason that they are not known; empty if they are

    def matrix(self, measure: str) -> Floats:
        """[S, Q] scores of a measure that every run has; without questions [S, 1]."""
        if self.questions:
            return np.stack([run.by_question[measure] for run in self.runs])
        return np.array([[run.measures[measure]] for run in self.runs])

    def has(self, measure: str) -> bool:
        """Check that every run has a measure."""
        return all(measure in run.measures for run in self.runs)

    @property
    def failed(self) -> int:
        """Number of questions without a score in some run."""
        missing = [np.isnan(scores) for run in self.runs for scores in run.by_question.values()]
        return int(np.any(missing, axis=0).sum()) if self.questions and missing else 0


def interval_scope(table: ArmScores) -> str:
    """The units that an interval of an arm's results is over: seeds, questions, or both."""
    parts = ["seeds"] * (len(table.runs) > 1) + ["questions"] * (len(table.questions) > 1)
    return " and ".join(parts) or "nothing"


def paired_difference(arm: Arm, baseline: Arm, tables: Mapping[str, ArmScores]) -> dict[str, Any]:
    """Compare an arm with the baseline, paired by seed and question."""
    reason = _incomparable_reason(arm, baseline, tables)
    if reason:
        return {"verdict": f"{arm.name} is not compared with {baseline.name}: {reason}."}
    pair = _paired(tables[arm.name], tables[baseline.name])
    found: dict[str, Any] = {"seeds": [run.run.seed for run in pair[0].runs], "over": interval_scope(pair[0])}
    measures = [m for m in _PAIRED if all(table.has(m) for table in pair)]
    blocks = np.stack([pair[0].matrix(measure) - pair[1].matrix(measure) for measure in measures])
    ends = bootstrap_complete_cases(blocks)
    for measure, (low, high) in zip(measures, ends.tolist(), strict=True):
        by_seed = [a.measures[measure] - b.measures[measure] for a, b in zip(pair[0].runs, pair[1].runs, strict=True)]
        found[measure] = {"mean": float(np.mean(by_seed)), "low": low, "high": high, "by_seed": by_seed}
    seeds = len(found["seeds"])
    if seeds > 1:
        found |= {"p": sign_flip_test(np.array(found["final_f1"]["by_seed"])), "smallest_p": smallest_p(seeds)}
    return found


def add_verdicts(differences: Mapping[str, dict[str, Any]], baseline: str) -> None:
    """Correct the p values of a comparison for their number, and add a verdict to every difference."""
    tested = [found for found in differences.values() if "p" in found]
    for found, corrected in zip(tested, holm_correction([found["p"] for found in tested]), strict=True):
        found["p_holm"] = corrected
    for name, found in differences.items():
        if "verdict" not in found:
            found["verdict"] = _verdict(name, baseline, found, len(tested))


def _incomparable_reason(arm: Arm, baseline: Arm, tables: Mapping[str, ArmScores]) -> str:
    """The reason that two arms cannot be compared; empty if they can."""
    first, second = tables[arm.name], tables[baseline.name]
    if not first.runs or not second.runs:
        return f"{(baseline if first.runs else arm).name} has no finished run"
    if arm.is_calibadv_run != baseline.is_calibadv_run:
        return "one of them is of another program, whose seeds give other draws"
    if first.questions and second.questions and first.questions != second.questions:
        return "they were validated on different questions"
    if not _shared_seeds(first, second):
        return "they have no seed in common"
    return _different_lags(_not_stopped(second) + _not_stopped(first))


def _different_lags(runs: Sequence[Run]) -> str:
    lags = {_final_lags(run): run.label for run in runs}
    if len(lags) <= 1:
        return ""
    texts = [f"{', '.join(map(str, steps))} in {label}" for steps, label in lags.items()]
    return (
        "the validations of their final F1 are at different numbers of rollout steps before the end of training: "
        + " and ".join(texts)
    )


def _not_stopped(table: ArmScores) -> list[Run]:
    """The runs that a guard has not ended early."""
    return [scores.run for scores in table.runs if not scores.run.stopped_by_guard]


def _final_lags(run: Run) -> tuple[int, ...]:
    """Steps from the validations of a run's final F1 to its end."""
    steps = [int(row["step"]) for row in final_validations(run.validations)]
    return tuple((run.planned or steps[-1]) - step for step in reversed(steps))


def _shared_seeds(first: ArmScores, second: ArmScores) -> list[int]:
    known = [{run.run.seed for run in table.runs if run.run.seed is not None} for table in (first, second)]
    return sorted(known[0] & known[1])


def _paired(first: ArmScores, second: ArmScores) -> tuple[ArmScores, ArmScores]:
    """Both arms, with the runs of shared seeds only, and by question only where both know the questions."""
    seeds = _shared_seeds(first, second)
    questions = first.questions if first.questions == second.questions else ()
    kept = [tuple(run for run in table.runs if run.run.seed in seeds) for table in (first, second)]
    return ArmScores(kept[0], questions, ""), ArmScores(kept[1], questions, "")


def _test_text(found: Mapping[str, Any], tests: int) -> str:
    corrected = f" ({found['p_holm']:.3g} corrected for {tests} tests)" if tests > 1 else ""
    return f"p = {found['p']:.3g}{corrected} over {len(found['seeds'])} paired seeds"


def _verdict(name: str, baseline: str, found: Mapping[str, Any], tests: int) -> str:
    """One sentence that claims no more than the interval and the corrected test allow together."""
    # As results.json and the tables have them: 0.10650049 must not read 0.107 here and 0.106 there.
    gap = {end: round(found["final_f1"][end], DIGITS) for end in ("mean", "low", "high")}
    if "p" not in found:
        return (
            f"{name} is not tested against {baseline}: final F1 differs by {gap['mean']:+.3f} in one seed, "
            "which says nothing of others."
        )
    test = _test_text(found, tests)
    ends = sorted(abs(gap[end]) for end in ("low", "high"))
    by = f"by {abs(gap['mean']):.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"
    if np.isnan(gap["low"]):
        return f"{name} is not distinguishable from {baseline} in final F1: {gap['mean']:+.3f}, {test}; no interval."
    side = "higher" if gap["low"] > 0 else "lower" if gap["high"] < 0 else ""
    if not side:
        interval = f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
        return f"{name} is not distinguishable from {baseline} in final F1: {interval}, {test}."
    if found["p_holm"] <= _SIGNIFICANT:
        return f"{name} is {side} than {baseline} in final F1 {by}, {test}."
    smallest = min(1.0, tests * found["smallest_p"])
    limit = f" (with so few seeds it is never below {smallest:.3g})" if smallest > _SIGNIFICANT else ""
    return (
        f"{name} is {side} than {baseline} in final F1 in these seeds {by}, but that is not established: {test}{limit}."
    )
