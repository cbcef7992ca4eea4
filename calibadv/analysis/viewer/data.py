"""Data of the viewer: one JSON object, which holds every document and every question once.

Its form, by the names that ``templates/*.js`` use::

    files      [name]                             statuses   [{name, meaning}]
    notes      [text]                             limit      advantage at which the colour is full, null without any
    documents  [[id, title, text]]                groups     [group]

    group      {file, step, id, question, golden, source, silver: [index], gold: [[label, [index]]], rollouts}
    rollout    {sample, status, score, answer_score, f1, em, answer, prepended, turns, correctness, estimated,
               calibrated}
    turn       [message, tokens, observation]

A index is a row of ``documents``. An observation is a list of indexes, a text where it shows no document, or null. A
number that is not finite is a string, such as ``"nan"``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import docstring_parser
import numpy as np

from calibadv.batch import group_rollouts
from calibadv.errors import UserError
from calibadv.rewards import F1
from calibadv.rewards.evidence import silver_documents, step_correctness
from calibadv.rewards.scoring import score_rollouts
from calibadv.runs.rollouts import Record, read_records
from calibadv.types import Document, Question, Rollout, RolloutStatus

# Colors are full from this quantile of the absolute advantages on: scaled by the largest one, most would look like 0.
_FULL_COLOR_QUANTILE = 0.99


@dataclass
class ViewerData:
    """Collects the data of rollout files, one after another."""

    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    groups: list[Record] = field(default_factory=list)
    _document_index: dict[Document, int] = field(default_factory=dict)
    _sizes: list[float] = field(default_factory=list)

    def add_file(self, path: Path, name: str) -> None:
        """Add the rollouts of a file."""
        records: list[Record] = []
        rollouts: list[Rollout] = []
        for record, rollout in read_records(path):
            _check_lengths(record, rollout, path)
            records.append(record)
            rollouts.append(_scored(record, rollout))
        if not records:
            raise UserError(f"rollout file '{path}' is empty; it needs at least one rollout")
        self.files.append(name)
        for rows in group_rollouts(rollouts):
            self._add_group([records[row] for row in rows], [rollouts[row] for row in rows])
        self._note_absent(name, records)

    def as_json(self) -> Record:
        """The JSON object of the page."""
        return {
            "files": self.files,
            "statuses": [{"name": name, "meaning": text} for name, text in status_descriptions().items()],
            "notes": self.notes,
            "limit": float(np.quantile(self._sizes, _FULL_COLOR_QUANTILE)) if self._sizes else None,
            "documents": [[document.id, document.title, document.text] for document in self._document_index],
            "groups": self.groups,
        }

    def _add_group(self, records: Sequence[Record], rollouts: Sequence[Rollout]) -> None:
        first = rollouts[0]
        rollouts, silver = _with_evidence(rollouts)
        shown = [self._rollout(record, rollout) for record, rollout in zip(records, rollouts, strict=True)]
        documents = {
            document: self._document_index[document] for rollout in rollouts for document in _documents(rollout)
        }
        self.groups.append(
            {
                "file": len(self.files) - 1,
                "step": first.step,
                "id": first.question.id,
                "question": first.question.question,
                "golden": first.question.golden_answers,
                "source": first.question.data_source,
                "silver": [index for document, index in documents.items() if document.id in silver],
                "gold": _gold(first.question, documents),
                "rollouts": shown,
            }
        )

    def _rollout(self, record: Record, rollout: Rollout) -> Record:
        advantages = record.get("advantages") or {}
        estimated, calibrated = (_numbers(advantages.get(key)) for key in ("estimated", "calibrated"))
        self._sizes += [abs(value) for value in [*(estimated or []), *(calibrated or [])] if isinstance(value, float)]
        return {
            "sample": rollout.sample,
            "status": str(rollout.status),
            "score": _number(rollout.score),
            "answer_score": None if rollout.answer_score is None else _number(rollout.answer_score),
            "f1": _number(rollout.f1),
            "em": rollout.em,
            "answer": rollout.answer,
            "prepended": rollout.prepend_think,
            "turns": list(self._turns(rollout)),
            "correctness": _numbers(rollout.step_correctness),
            "estimated": estimated,
            "calibrated": calibrated,
        }

    def _turns(self, rollout: Rollout) -> Iterator[list[Any]]:
        for index in range(0, len(rollout.segments), 2):
            message, *observations = rollout.segments[index : index + 2]
            observation: list[int] | str | None = None
            for shown in observations:
                indexes = [
                    self._document_index.setdefault(document, len(self._document_index))
                    for document in shown.documents or ()
                ]
                observation = indexes or shown.text
            yield [message.text, message.num_tokens, observation]

    def _note_absent(self, name: str, records: Sequence[Record]) -> None:
        if any(record.get("score") is None for record in records):
            self.notes.append(f"{name} holds rollouts without a score: they are scored here by F1, 0 unless valid.")
        advantages = [value for record in records for value in (record.get("advantages") or {}).values()]
        if all(value is None for value in advantages):
            self.notes.append(f"{name} holds no advantages: calibadv replay computes them.")


def status_descriptions() -> dict[str, str]:
    """The description of each status, from the docstring of ``RolloutStatus``."""
    texts = {
        entry.arg_name: entry.description or "" for entry in docstring_parser.parse_from_object(RolloutStatus).params
    }
    return {str(status): texts[status.name].replace("``", "") for status in RolloutStatus}


def _check_lengths(record: Record, rollout: Rollout, path: Path) -> None:
    """Check that there is one value per turn: otherwise they would be shown at the wrong turns."""
    where = f"{path}, question '{rollout.question.id}', sample {rollout.sample}, step {rollout.step}"
    messages = len(rollout.policy_segments)
    advantages = record.get("advantages") or {}
    if not isinstance(advantages, dict):
        raise UserError(f"{where}: advantages is not an object; write estimated and calibrated, or leave it out")
    for key in ("estimated", "calibrated"):
        values = advantages.get(key)
        if values is not None and not _is_numbers(values, messages):
            raise UserError(
                f"{where}: advantages.{key} must be one number for each of the {messages} policy segments; "
                "calibadv replay computes them again"
            )
    if rollout.step_correctness and len(rollout.step_correctness) != messages - 1:
        raise UserError(
            f"{where}: step_correctness has {len(rollout.step_correctness)} values and the rollout {messages - 1} "
            "search turns; calibadv replay computes them again"
        )


def _is_numbers(values: Any, length: int) -> bool:
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    return numbers and len(values) == length


def _scored(record: Record, rollout: Rollout) -> Rollout:
    """Extract the answer, which files do not hold, and score it; a recorded score is kept."""
    [scored] = score_rollouts([rollout], F1())
    kept = {key: getattr(rollout, key) for key in ("score", "answer_score") if record.get(key) is not None}
    return replace(scored, **kept)


def _with_evidence(rollouts: Sequence[Rollout]) -> tuple[Sequence[Rollout], frozenset[str]]:
    """A group with step correctness, and the ids of its silver documents.

    A single rollout without recorded step correctness has no group to estimate evidence from.
    """
    if len(rollouts) == 1 and not rollouts[0].step_correctness:
        return rollouts, frozenset()
    silver = silver_documents(rollouts)
    return [
        r if r.step_correctness else replace(r, step_correctness=step_correctness(r, silver)) for r in rollouts
    ], silver


def _documents(rollout: Rollout) -> Iterator[Document]:
    return (document for segment in rollout.segments for document in segment.documents or ())


def _gold(question: Question, documents: dict[Document, int]) -> list[list[Any]]:
    """The gold documents that the question names, each with the indexes of its retrieved documents."""
    kind, labels = question.supporting()
    return [
        [label, [index for document, index in documents.items() if getattr(document, kind) == label]]
        for label in labels
    ]


def _numbers(values: Sequence[float | None] | None) -> list[float | str | None] | None:
    return None if values is None else [None if value is None else _number(value) for value in values]


def _number(value: float) -> float | str:
    """A number with six digits, more than the page shows; JSON has no NaN and no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(float(value))
