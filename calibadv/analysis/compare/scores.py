"""What a run achieved: from its validations, and question by question from its rollout files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibadv.analysis.compare.runs import Run
from calibadv.rewards.answer import F1
from calibadv.rewards.scoring import score_rollouts
from calibadv.runs.folder import RunFolder
from calibadv.runs.rollouts import read_rollouts
from calibadv.runs.summary import final_validations, outcome

Floats = NDArray[np.float64]
MEASURES = ("final_f1", "final_em", "best_f1", "best_em", "untrained_f1", "untrained_em")


@dataclass(frozen=True)
class RunScores:
    """The results of one run that is finished.

    Attributes:
        run: what they are of.
        questions: [Q] what was asked: identity of each question, in one order for all runs; empty if not known.
        by_question: [Q] scores by measure, NaN where a search failed; empty if not known.
        reason: why there are none by question; empty where there are.
    """

    run: Run
    questions: tuple[str, ...]
    by_question: Mapping[str, Floats]
    reason: str

    @cached_property
    def outcome(self) -> dict[str, Any]:
        """As ``calibadv.runs.summary`` defines it; a run without format validity cannot collapse by that."""
        return outcome([{"format_valid": 1.0, **row} for row in self.run.validations])

    @cached_property
    def measures(self) -> dict[str, float]:
        """The measures that the run's validations give, by name."""
        rows = self.run.validations
        found: dict[str, float] = {}
        for measure, steps in _steps(rows).items():
            name = measure.rpartition("_")[2]
            values = [row[name] for row in rows if row["step"] in steps and name in row]
            if values and len(values) == len(steps):
                found[measure] = sum(values) / len(values)
        return found


def _steps(validations: Sequence[Mapping[str, float]]) -> dict[str, list[int]]:
    """The validations that each measure is the mean of: final ones, the best by F1 (the first of equals), the first."""
    steps = [int(row["step"]) for row in validations]
    best = max(validations, key=lambda row: row["f1"])
    chosen = {
        "final": [int(row["step"]) for row in final_validations(validations)],
        "best": [int(best["step"])],
        "untrained": [0] if 0 in steps else [],
    }
    return {measure: chosen[measure.partition("_")[0]] for measure in MEASURES}


def score_run(run: Run) -> RunScores:
    """Read what a run achieved."""
    if not run.is_calibadv_run:
        return RunScores(run, (), {}, "the run of another program has no rollouts of ours")
    needed = _steps(run.validations)
    read: dict[int, dict[str, tuple[float, float]]] = {}
    for step in sorted({step for steps in needed.values() for step in steps}):
        path = RunFolder(run.path).rollout_file("val", step)
        if not path.exists():
            return RunScores(run, (), {}, f"{run.label} has no {path.name}")
        read[step] = _read_scores(path)
        row = next(row for row in run.validations if row["step"] == step)
        if not _agree(row, read[step]):
            return RunScores(run, (), {}, f"{path.name} of {run.label} is not what its results.json is of")
    questions = sorted(read[next(iter(read))])
    if any(sorted(scores) != questions for scores in read.values()):
        return RunScores(run, (), {}, f"{run.label} was not validated on the same questions each time")
    by_question = {
        measure: np.mean([[read[step][q][measure.endswith("em")] for q in questions] for step in steps], axis=0)
        for measure, steps in needed.items()
        if steps
    }
    return RunScores(run, tuple(questions), by_question, "")


def _read_scores(path: Path) -> dict[str, tuple[float, float]]:
    """F1 and EM by question: its id and its text and answers, so that equal ids alone do not make a pair."""
    scores: dict[str, tuple[float, float]] = {}
    for rollout in score_rollouts(read_rollouts(path), F1()):
        question = rollout.question
        identity = json.dumps([question.data_source, question.id, question.question, question.golden_answers])
        scores[identity] = (rollout.f1, rollout.em) if rollout.included else (np.nan, np.nan)
    return scores


def _agree(row: Mapping[str, float], scores: Mapping[str, tuple[float, float]]) -> bool:
    pairs = np.array(list(scores.values()))
    answered = pairs[np.isfinite(pairs[:, 0])] if len(pairs) else pairs
    expected = (row["f1"], row.get("em", np.nan))
    return len(answered) > 0 and bool(np.allclose(answered.mean(0), expected, atol=1e-6, rtol=0))
