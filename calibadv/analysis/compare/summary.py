"""Results of a comparison per arm and per run, in the form of results.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from calibadv.analysis.compare.arms import Arm, differing_settings, shared_settings
from calibadv.analysis.compare.differences import DIGITS, ArmScores, add_verdicts, interval_scope, paired_difference
from calibadv.analysis.compare.runs import Run
from calibadv.analysis.compare.scores import MEASURES, RunScores
from calibadv.analysis.statistics import LEVEL, RESAMPLES, bootstrap_complete_cases, wilson_interval
from calibadv.errors import UserError

Results = dict[str, Any]
_RECORDED = ("seed", "threads", "device", "versions", "machine")


def default_baseline(names: Sequence[str]) -> str:
    """Return the default baseline: grpo, or else the first arm."""
    return "grpo" if "grpo" in names else names[0]


def choose_baseline(arms: Sequence[Arm], name: str | None) -> Arm:
    """Return the arm to compare the others with."""
    by_name = {arm.name: arm for arm in arms}
    name = default_baseline(list(by_name)) if name is None else name
    if name not in by_name:
        raise UserError(f"baseline '{name}' is none of the arms: " + ", ".join(f"'{known}'" for known in by_name))
    return by_name[name]


def summarize(arms: Sequence[Arm], baseline: Arm, scores: Mapping[str, Sequence[RunScores]]) -> Results:
    """Compute all results of a comparison."""
    tables = {arm.name: _arm_scores(scores[arm.name]) for arm in arms}
    compared = {arm.name: paired_difference(arm, baseline, tables) for arm in arms if arm is not baseline}
    add_verdicts(compared, baseline.name)
    firsts = [arm.runs[0] for arm in arms]
    results: Results = {
        "baseline": baseline.name,
        "untrained": _untrained(arms, tables),
        "arms": [_arm_results(arm, tables[arm.name], compared.get(arm.name)) for arm in arms],
        "comparisons": {"tested": sum("p" in found for found in compared.values()), "correction": "Holm"},
        "settings": {key: dict(zip(tables, texts, strict=True)) for key, texts in differing_settings(firsts).items()},
        "shared_settings": shared_settings(firsts),
        "method": {"interval": LEVEL, "resamples": RESAMPLES},
        "warnings": _warnings(arms, tables),
        "runs": [_run_results(arm, tables[arm.name], run) for arm in arms for run in arm.runs],
    }
    rounded: Results = _rounded(results)
    return rounded


def _arm_scores(runs: Sequence[RunScores]) -> ArmScores:
    """Collect the scores of an arm, by question if all of its runs were asked the same ones."""
    reason = next((run.reason for run in runs if run.reason), "")
    if not reason and len({run.questions for run in runs}) > 1:
        reason = f"{runs[0].run.label} and others of its arm were validated on different questions"
    return ArmScores(tuple(runs), runs[0].questions if runs and not reason else (), reason)


def _arm_results(arm: Arm, table: ArmScores, difference: Results | None) -> Results:
    collapses = [
        {"seed": run.run.seed, "step": run.outcome["step_of_collapse"]}
        for run in table.runs
        if run.outcome["collapsed"]
    ]
    low, high = wilson_interval(len(collapses), len(table.runs)) if table.runs else (np.nan, np.nan)
    results = {
        "name": arm.name,
        "seeds": [run.seed for run in arm.runs],
        "finished": [run.seed for run in arm.finished],
        **_measures(table),
        "over": interval_scope(table),
        "questions": len(table.questions) or None,
        "collapsed": {"runs": len(collapses), "of": len(table.runs), "low": low, "high": high, "when": collapses},
    }
    return results if difference is None else {**results, "difference": difference}


def _measures(table: ArmScores) -> Results:
    """Mean over the runs, interval, and values of the runs, of each measure that all of them have."""
    shared = [measure for measure in MEASURES if table.runs and all(measure in run.measures for run in table.runs)]
    blocks = np.stack([table.matrix(measure) for measure in shared]) if shared else np.empty((0, 0, 0))
    ends = bootstrap_complete_cases(blocks)
    found: Results = {}
    for measure, (low, high) in zip(shared, ends.tolist(), strict=True):
        values = [run.measures[measure] for run in table.runs]
        found[measure] = {"mean": float(np.mean(values)), "low": low, "high": high, "by_run": values}
    return found


def _untrained(arms: Sequence[Arm], tables: Mapping[str, ArmScores]) -> list[Results]:
    """Rows of the policy before training, one per set of arms that start with the same scores on the same questions."""
    rows: dict[str, Results] = {}
    for arm in arms:
        table = tables[arm.name]
        if not table.runs or any("untrained_f1" not in run.measures for run in table.runs):
            continue
        scores = table.matrix("untrained_f1")
        # If all seeds start from one policy, as those of a study do, one run represents them.
        if all(np.array_equal(scores[0], other, equal_nan=True) for other in scores):
            table, scores = ArmScores(table.runs[:1], table.questions, table.reason), scores[:1]
        results = _measures(table)
        row = {"arms": [], "f1": results["untrained_f1"], "em": results.get("untrained_em")}
        row["seeds"] = [run.run.seed for run in table.runs] if len(table.runs) > 1 else None
        rows.setdefault(str(scores.tolist()), row)["arms"].append(arm.name)
    return list(rows.values())


def _run_results(arm: Arm, table: ArmScores, run: Any) -> Results:
    scored = next((scores for scores in table.runs if scores.run is run), None)
    results = {
        "run": run.label,
        "arm": arm.name,
        **{key: run.results.get(key) for key in _RECORDED},
        "seed": run.seed,
        "rollout_steps": run.steps_done,
        "finished": scored is not None,
    }
    if scored is not None:
        results |= scored.measures | {key: scored.outcome[key] for key in ("collapsed", "step_of_collapse")}
    kept = ("step", "f1", "em", "format_valid")
    results["validations"] = [{key: row[key] for key in kept if key in row} for row in run.validations]
    return results


def _warnings(arms: Sequence[Arm], tables: Mapping[str, ArmScores]) -> list[str]:
    runs = [run for arm in arms for run in arm.runs]
    found = [*_unfinished([run for run in runs if not run.finished]), *_filtered(arms), *_stopped_by_guard(runs)]
    for arm in arms:
        found += [*_missing_seeds(arm, arms), *_limits_of_scores(arm.name, tables[arm.name])]
    found += chain.from_iterable(_searches_failed(run) for run in runs)
    found += [f"the runs differ in {name}: {text}" for name, text in _unequal(arms).items()]
    return [*found, *chain.from_iterable(run.notes for run in runs)]


def _unfinished(runs: Sequence[Run]) -> list[str]:
    stopped = [run for run in runs if run.planned is not None and run.steps_done < run.planned]
    return [
        f"{run.label} is not finished ({run.steps_done} of {run.planned} rollout steps): it is in the curves, "
        "and in no table"
        for run in stopped
    ] + [f"{run.label} has no val/f1: it is in the curves, and in no table" for run in runs if run not in stopped]


def _stopped_by_guard(runs: Sequence[Run]) -> list[str]:
    return [
        f"{run.label} was stopped by its guard after {run.steps_done} of {run.planned} rollout steps: its results are "
        "those up to that step"
        for run in runs
        if run.finished and run.stopped_by_guard
    ]


def _filtered(arms: Sequence[Arm]) -> list[str]:
    filtered = [arm.name for arm in arms if any("filter/asked" in run.curves for run in arm.runs)]
    if len(filtered) in (0, len(arms)):
        return []
    return [
        f"{', '.join(filtered)} dropped groups by a filter: curves of training, such as reward/* and credit/*, are of "
        "the groups that were kept, and not comparable with those of other arms"
    ]


def _missing_seeds(arm: Arm, arms: Sequence[Arm]) -> list[str]:
    present = {run.seed for run in arm.runs}
    if present == {None}:
        return []
    comparable = [run.seed for other in arms if other.is_calibadv_run == arm.is_calibadv_run for run in other.runs]
    missing = sorted({seed for seed in comparable if seed is not None and seed not in present})
    return [f"{arm.name} has no run of seed {', '.join(map(str, missing))}, which other arms have"] if missing else []


def _limits_of_scores(name: str, table: ArmScores) -> Iterator[str]:
    if table.runs and table.reason:
        yield f"{name}: intervals are over seeds only, not over questions: {table.reason}"
    if table.failed:
        yield f"{name}: questions whose search failed in a run, and that are in no interval: {table.failed}"
    if any("format_valid" not in row for run in table.runs for row in run.run.validations):
        yield f"{name}: format validity is not known, so a run can count as collapsed by its F1 only"


def _searches_failed(run: Run) -> list[str]:
    """A warning if validations of a run are means over different sets of questions."""
    failed = {int(row["step"]): missing for row in run.validations if (missing := row.get("search_failed"))}
    if not failed:
        return []
    step, most = max(failed.items(), key=lambda item: item[1])
    return [
        f"{run.label}: searches failed in {len(failed)} of {len(run.validations)} validations (most at step {step}: "
        f"{most:.0f} without a result): their means are over the other questions"
    ]


def _unequal(arms: Sequence[Arm]) -> dict[str, str]:
    """Properties that all runs should share, and the values of those that differ."""
    runs = [run for arm in arms for run in arm.runs if run.results]
    finished = chain.from_iterable(arm.finished for arm in arms)
    values: dict[str, list[Any]] = {
        **{name: [run.results.get(name) for run in runs] for name in ("threads", "device")},
        **_versions(runs),
        "the rollout steps asked for": [run.planned for run in runs],
        "the steps of validation": [[row["step"] for row in run.validations] for run in finished],
    }
    return _differing(values)


def _differing(values: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    texts = {name: sorted(set(map(str, found))) for name, found in values.items()}
    return {name: " / ".join(found) for name, found in texts.items() if len(found) > 1}


def _versions(runs: Sequence[Run]) -> dict[str, list[Any]]:
    versions = [run.results.get("versions", {}) for run in runs]
    names = sorted(set(chain.from_iterable(versions)))
    return {f"the version of {name}": [known.get(name) for known in versions] for name in names}


def _rounded(value: Any) -> Any:
    """Round every float, which hides noise of the last bits; NaN, which JSON lacks, becomes null."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, DIGITS) + 0.0
    return value
