"""The results of a comparison, per arm and per run, as results.json holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The arm to compare with where none is named."""
    return "grpo" if "grpo" in names else names[0]


def choose_baseline(arms: Sequence[Arm], name: str | None) -> Arm:
    """The arm to compare with."""
    by_name = {arm.name: arm for arm in arms}
    name = default_baseline(list(by_name)) if name is None else name
    if name not in by_name:
        raise UserError(f"baseline '{name}' is none of the arms: " + ", ".join(f"'{known}'" for known in by_name))
    return by_name[name]


def summarize(arms: Sequence[Arm], baseline: Arm, scores: Mapping[str, Sequence[RunScores]]) -> Results:
    """Compute all results of a comparison."""
    tables = {arm.name: _arm_scores(scores[arm.name]) for arm in arms}
    rows = [_arm_results(arm, tables[arm.name]) for arm in arms]
    for arm, row in zip(arms, rows, strict=True):
        if arm is not baseline:
            row["difference"] = paired_difference(arm, baseline, tables)
    compared = {row["name"]: row["difference"] for row in rows if "difference" in row}
    add_verdicts(compared, baseline.name)
    firsts = [arm.runs[0] for arm in arms]
    results: Results = {
        "baseline": baseline.name,
        "untrained": _untrained(arms, tables),
        "arms": rows,
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
    """Put the runs of an arm into one table, by question where all of its runs were asked the same ones."""
    reason = next((run.reason for run in runs if run.reason), "")
    if not reason and len({run.questions for run in runs}) > 1:
        reason = f"{runs[0].run.label} and others of its arm were validated on different questions"
    if reason or not runs:
        return ArmScores(tuple(runs), (), reason)
    return ArmScores(tuple(runs), runs[0].questions, "")


def _arm_results(arm: Arm, table: ArmScores) -> Results:
    collapses = [
        {"seed": run.run.seed, "step": run.outcome["step_of_collapse"]}
        for run in table.runs
        if run.outcome["collapsed"]
    ]
    return {
        "name": arm.name,
        "seeds": [run.seed for run in arm.runs],
        "finished": [run.seed for run in arm.finished],
        **_measures(table),
        "over": interval_scope(table),
        "questions": len(table.questions) or None,
        "collapsed": {"runs": len(collapses), "of": len(table.runs), **_share(collapses, table), "when": collapses},
    }


def _share(collapses: Sequence[Results], table: ArmScores) -> Results:
    low, high = wilson_interval(len(collapses), len(table.runs)) if table.runs else (np.nan, np.nan)
    return {"low": low, "high": high}


def _measures(table: ArmScores) -> Results:
    """Mean over the runs, interval, and the single runs' values, of each measure that all of the runs have."""
    shared = [measure for measure in MEASURES if table.runs and all(measure in run.measures for run in table.runs)]
    blocks = np.stack([table.matrix(measure) for measure in shared]) if shared else np.empty((0, 0, 0))
    ends = bootstrap_complete_cases(blocks)
    found: Results = {}
    for measure, (low, high) in zip(shared, ends.tolist(), strict=True):
        values = [run.measures[measure] for run in table.runs]
        found[measure] = {"mean": float(np.mean(values)), "low": low, "high": high, "by_run": values}
    return found


def _untrained(arms: Sequence[Arm], tables: Mapping[str, ArmScores]) -> list[Results]:
    """Rows of the policy before training: one for all arms that start with the same scores on the same questions."""
    rows: dict[str, Results] = {}
    for arm in arms:
        table = tables[arm.name]
        if not table.runs or any("untrained_f1" not in run.measures for run in table.runs):
            continue
        scores = table.matrix("untrained_f1")
        # Where all seeds start from one policy, as ours do, one run tells it all.
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
    found = [
        f"{run.label} is not finished ({run.steps_done} of {run.planned} rollout steps): it is in the curves, "
        "and in no table"
        for arm in arms
        for run in arm.unfinished
        if run.planned is not None and run.steps_done < run.planned
    ]
    found += [
        f"{run.label} has no val/f1: it is in the curves, and in no table"
        for arm in arms
        for run in arm.unfinished
        if run.planned is None or run.steps_done >= run.planned
    ]
    filtered = {arm.name: any("filter/asked" in run.curves for run in arm.runs) for arm in arms}
    if len(set(filtered.values())) > 1:
        found.append(
            f"{', '.join(name for name, some in filtered.items() if some)} dropped groups by a filter: curves of "
            "training, such as reward/* and credit/*, are of what was kept, and not comparable with those of other arms"
        )
    found += [
        f"{run.label} was stopped by its guard after {run.steps_done} of {run.planned} rollout steps: its results are "
        "those up to there"
        for arm in arms
        for run in arm.finished
        if run.stopped_by_guard
    ]
    for arm in arms:
        comparable = [run for other in arms if other.is_calibadv_run == arm.is_calibadv_run for run in other.runs]
        seeds = sorted({run.seed for run in comparable if run.seed is not None})
        present = {run.seed for run in arm.runs}
        missing = [str(seed) for seed in seeds if seed not in present] if present != {None} else []
        if missing:
            found.append(f"{arm.name} has no run of seed {', '.join(missing)}, which other arms have")
        table = tables[arm.name]
        if table.runs and table.reason:
            found.append(f"{arm.name}: intervals are over seeds only, not over questions: {table.reason}")
        if table.failed:
            found.append(
                f"{arm.name}: questions whose search failed in a run, and that are in no interval: {table.failed}"
            )
        if any("format_valid" not in row for run in table.runs for row in run.run.validations):
            found.append(f"{arm.name}: format validity is not known, so a run can count as collapsed by its F1 only")
    found += [note for arm in arms for run in arm.runs for note in _searches_failed(run)]
    found += [f"the runs differ in {name}: {text}" for name, text in _unequal(arms).items()]
    return found + [note for arm in arms for run in arm.runs for note in run.notes]


def _searches_failed(run: Run) -> list[str]:
    """That validations of a run are means over unequal sets of questions."""
    failed = {int(row["step"]): missing for row in run.validations if (missing := row.get("search_failed"))}
    if not failed:
        return []
    step, most = max(failed.items(), key=lambda item: item[1])
    return [
        f"{run.label}: searches failed in {len(failed)} of {len(run.validations)} validations (most at step {step}: "
        f"{most:.0f} without a result): their means are over the other questions"
    ]


def _unequal(arms: Sequence[Arm]) -> dict[str, str]:
    """What all runs should share, and do not."""
    runs = [run for arm in arms for run in arm.runs if run.results]
    values = {
        "threads": {str(run.results.get("threads")) for run in runs},
        "device": {str(run.results.get("device")) for run in runs},
    }
    packages = sorted({name for run in runs for name in run.results.get("versions", {})})
    for name in packages:
        values[f"the version of {name}"] = {str(run.results.get("versions", {}).get(name)) for run in runs}
    values["the rollout steps asked for"] = {str(run.planned) for run in runs}
    values["the steps of validation"] = {
        str([row["step"] for row in run.validations]) for arm in arms for run in arm.finished
    }
    return {name: " / ".join(sorted(found)) for name, found in values.items() if len(found) > 1}


def _rounded(value: Any) -> Any:
    """Round every fraction, so that no noise of the last bits shows; NaN, which JSON lacks, becomes null."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, DIGITS) + 0.0
    return value
