"""Scores of runs: means from their validations, and scores by question from their rollout files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from calibadv.analysis.compare.runs import Run
from calibadv.analysis.statistics import Floats
from calibadv.rewards.answer import F1
from calibadv.rewards.scoring import score_rollouts
from calibadv.runs.folder import RunFolder
from calibadv.runs.rollouts import read_rollouts
from calibadv.runs.summary import final_validations, summarize_run

MEASURES = ("final_f1", "final_em", "best_f1", "best_em", "untrained_f1", "untrained_em")


@dataclass(frozen=True)
class RunScores:
    """The results of one run that is finished."""

    run: Run
    questions: tuple[str, ...]  # [Q] identity of each question, in one order for all runs; empty if unknown
    by_question: Mapping[str, Floats]  # [Q] scores by measure, NaN where a search failed; empty if unknown
    reason: str  # the reason that there are none by question; empty if there are

    @cached_property
    def outcome(self) -> dict[str, Any]:
        """The outcome by ``calibadv.runs.summary``; without format validity a run cannot collapse by it."""
        return summarize_run([{"format_valid": 1.0, **row} for row in self.run.validations])

    @cached_property
    def measures(self) -> dict[str, float]:
        """The measures, by name, that the validations of the run hold."""
        rows = self.run.validations
        found: dict[str, float] = {}
        for measure, steps in _steps(rows).items():
            name = measure.rpartition("_")[2]
            values = [row[name] for row in rows if row["step"] in steps and name in row]
            if values and len(values) == len(steps):
                found[measure] = sum(values) / len(values)
        return found


def _steps(validations: Sequence[Mapping[str, float]]) -> dict[str, list[int]]:
    """Steps of the validations that each measure averages: the final ones, the best by F1 (first of equals), or 0."""
    steps = [int(row["step"]) for row in validations]
    best = max(validations, key=lambda row: row["f1"])
    chosen = {
        "final": [int(row["step"]) for row in final_validations(validations)],
        "best": [int(best["step"])],
        "untrained": [0] if 0 in steps else [],
    }
    return {measure: chosen[measure.partition("_")[0]] for measure in MEASURES}


class _NoQuestionScoresError(Exception):
    """The rollout files of a run do not give scores by question; the message is the reason."""


def score_run(run: Run) -> RunScores:
    """Return the scores of a run, by question if its rollout files hold them."""
    if not run.is_calibadv_run:
        return RunScores(run, (), {}, "the run of another program has no rollout files of calibadv")
    needed = _steps(run.validations)
    try:
        read = {step: _scores_at(run, step) for step in sorted(set(chain.from_iterable(needed.values())))}
    except _NoQuestionScoresError as error:
        return RunScores(run, (), {}, str(error))
    first, *others = (sorted(scores) for scores in read.values())
    if any(questions != first for questions in others):
        return RunScores(run, (), {}, f"{run.label} was not validated on the same questions each time")
    by_question = {
        measure: _means(measure, [read[step] for step in steps], first) for measure, steps in needed.items() if steps
    }
    return RunScores(run, tuple(first), by_question, "")


def _means(measure: str, validations: Sequence[Mapping[str, tuple[float, float]]], questions: Sequence[str]) -> Floats:
    """[Q] mean over some validations."""
    column = int(measure.endswith("em"))
    means: Floats = np.mean([[scores[question][column] for question in questions] for scores in validations], axis=0)
    return means


def _scores_at(run: Run, step: int) -> dict[str, tuple[float, float]]:
    """The scores of one validation, checked against results.json."""
    path = RunFolder(run.path).rollout_file("val", step)
    if not path.exists():
        raise _NoQuestionScoresError(f"{run.label} has no {path.name}")
    scores = _read_scores(path)
    row = next(row for row in run.validations if row["step"] == step)
    if not _agree(row, scores):
        raise _NoQuestionScoresError(f"{path.name} of {run.label} does not match its results.json")
    return scores


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
