"""Rollouts as JSON lines: one record per rollout, in the format of docs/formats.md."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from calibadv.errors import UserError
from calibadv.io.files import replace_durably
from calibadv.io.jsonl import read_jsonl
from calibadv.protocol.search import SearchProtocol
from calibadv.types import Document, Question, Rollout, RolloutStatus, Segment

Record = dict[str, Any]
TurnValues = Sequence[Sequence[float] | None]


def rollout_to_json(
    rollout: Rollout, estimated: Sequence[float] | None = None, calibrated: Sequence[float] | None = None
) -> Record:
    """Return the record of one rollout, without token ids and log-probabilities.

    Args:
        rollout: a finished rollout, with or without score and step correctness.
        estimated: advantage of each policy segment; None for a rollout without advantages.
        calibrated: the same after the calibrators.

    Returns:
        A JSON object.
    """
    question = rollout.question
    optional = {"data_source": question.data_source, "metadata": question.metadata}
    return {
        "question_id": question.id,
        "sample": rollout.sample,
        "question": question.question,
        "golden_answers": list(question.golden_answers),
        **{key: value for key, value in optional.items() if value},
        **({"prompt": rollout.prompt} if rollout.prompt else {}),
        "prepend_think": rollout.prepend_think,
        "segments": [_segment_to_json(segment) for segment in rollout.segments],
        "status": str(rollout.status),
        "step": rollout.step,
        "format_valid": rollout.format_valid,
        "score": rollout.score,
        "answer_score": rollout.answer_score,
        "step_correctness": list(rollout.step_correctness),
        "advantages": {"estimated": estimated, "calibrated": calibrated},
    }


def _segment_to_json(segment: Segment) -> Record:
    record: Record = {"source": segment.source, "text": segment.text, "num_tokens": segment.num_tokens}
    if segment.source == "environment":
        documents = segment.documents
        shown = None if documents is None else [{"id": d.id, "title": d.title, "text": d.text} for d in documents]
        record["documents"] = shown
    return record


def write_rollouts(
    path: Path, rollouts: Sequence[Rollout], estimated: TurnValues | None = None, calibrated: TurnValues | None = None
) -> None:
    """Write rollouts to a file, which appears whole or not at all.

    Args:
        path: file to make or replace; its folder is made.
        rollouts: B rollouts.
        estimated: B lists of one advantage per policy segment, None for rollouts that are not included.
        calibrated: the same after the calibrators.
    """
    none = [None] * len(rollouts)
    columns = zip(rollouts, estimated or none, calibrated or none, strict=True)
    write_records(path, (rollout_to_json(rollout, before, after) for rollout, before, after in columns))


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write JSON objects as the lines of a file, which appears whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # A lone surrogate, valid in JSON but not in UTF-8, is written as its JSON escape \udXXX.
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        replace_durably(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_rollouts(path: Path) -> Iterator[Rollout]:
    """Yield the rollouts of a file as ``read_records`` does."""
    for _, rollout in read_records(path):
        yield rollout


def read_records(path: Path) -> Iterator[tuple[Record, Rollout]]:
    """Yield each rollout of a file, behind its JSON object with any unknown keys.

    Blank lines are skipped. For a line that is no rollout, a UserError names the file, the line and the remedy.
    """
    for number, record in read_jsonl(path, "rollout file"):
        try:
            yield record, rollout_from_json(record, number)
        except ValueError as error:
            raise UserError(f"{path}, {error}") from error


def rollout_from_json(record: Record, line_number: int) -> Rollout:
    """Return the rollout of a record.

    The status follows from the text: ``answered`` if every message is valid. A recorded ``search_failed`` is kept, and
    so is a recorded reason why an invalid rollout ended.

    Args:
        record: a JSON object.
        line_number: of the record, for error messages.

    Returns:
        A rollout without token ids. Computed values are taken as recorded; ``answer``, ``f1``, ``em`` and ``cover_em``,
        which files do not contain, have their defaults.

    Raises:
        UserError: the record is not a rollout; the message names the line, what is wrong and the remedy.
    """
    where = f"line {line_number}"
    prepend_think = _field(record, "prepend_think", bool, where)
    segments = _segments(_field(record, "segments", list, where), where)
    step_correctness = _field(record, "step_correctness", list, where, [])
    protocol = SearchProtocol(prepend_think=prepend_think)
    messages = protocol.messages(segments)
    return Rollout(
        question=_question(record, where),
        sample=_field(record, "sample", int, where),
        step=_field(record, "step", int, where, 0),
        prepend_think=prepend_think,
        segments=segments,
        status=_status(record.get("status"), protocol.is_valid(messages), where),
        messages=messages,
        prompt=_field(record, "prompt", str, where, ""),
        score=_field(record, "score", float, where, 0.0),
        answer_score=_field(record, "answer_score", float, where, None),
        step_correctness=tuple(
            None if value is None else _typed(value, float, f"{where}: step_correctness") for value in step_correctness
        ),
    )


_REQUIRED = object()
_TYPE_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
_TYPE_NAMES |= {dict: "an object"}


def _field(record: Record, key: str, kind: type, where: str, default: Any = _REQUIRED) -> Any:
    if record.get(key) is None:
        if default is _REQUIRED:
            raise UserError(f"{where}: {key} is missing; add it ({_TYPE_NAMES[kind]})")
        return default
    return _typed(record[key], kind, f"{where}: {key}")


def _typed(value: Any, kind: type, name: str) -> Any:
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise UserError(f"{name} is {json.dumps(value)[:80]}; it must be {_TYPE_NAMES[kind]}")
    return float(value) if kind is float else value


def _question(record: Record, where: str) -> Question:
    golden = _field(record, "golden_answers", list, where)
    if not golden:
        raise UserError(f"{where}: golden_answers is empty; give at least one accepted answer")
    return Question(
        id=_field(record, "question_id", str, where),
        question=_field(record, "question", str, where),
        golden_answers=[_typed(answer, str, f"{where}: golden_answers[{n}]") for n, answer in enumerate(golden)],
        data_source=_field(record, "data_source", str, where, ""),
        metadata=_field(record, "metadata", dict, where, {}),
    )


def _segments(records: list[Any], where: str) -> tuple[Segment, ...]:
    if not records:
        raise UserError(f"{where}: segments is empty; a rollout has at least one policy segment")
    segments = []
    for number, record in enumerate(records):
        place = f"{where}: segments[{number}]"
        segment = _segment(_typed(record, dict, place), place)
        due = "policy" if number % 2 == 0 else "environment"
        if segment.source != due:
            problem = f"follows another {segment.source} segment" if number else f"is the {segment.source}'s"
            raise UserError(
                f"{place} {problem}; segments begin with policy and alternate: join neighbours of one source"
            )
        segments.append(segment)
    return tuple(segments)


def _segment(record: Record, where: str) -> Segment:
    source = _field(record, "source", str, where)
    if source not in ("policy", "environment"):
        raise UserError(f"{where}: source is '{source}'; it must be 'policy' or 'environment'")
    num_tokens = _field(record, "num_tokens", int, where)
    if num_tokens < 0:
        raise UserError(f"{where}: num_tokens is {num_tokens}; it must be 0 or more")
    found = _field(record, "documents", list, where, [])
    documents = tuple(_document(document, f"{where}.documents[{n}]") for n, document in enumerate(found))
    return Segment(
        source=source,
        text=_field(record, "text", str, where),
        num_tokens=num_tokens,
        documents=None if record.get("documents", found) is None else documents,
    )


def _document(record: Any, where: str) -> Document:
    fields = _typed(record, dict, where)
    return Document(
        id=_field(fields, "id", str, where),
        title=_field(fields, "title", str, where, ""),
        text=_field(fields, "text", str, where, ""),
    )


def _status(recorded: Any, is_valid: bool, where: str) -> RolloutStatus:
    names = [str(status) for status in RolloutStatus]
    if recorded is not None and recorded not in names:
        raise UserError(f"{where}: status is {json.dumps(recorded)}; it must be one of {', '.join(names)}")
    if recorded == RolloutStatus.SEARCH_FAILED:
        return RolloutStatus.SEARCH_FAILED
    if is_valid:
        return RolloutStatus.ANSWERED
    if recorded in (None, RolloutStatus.ANSWERED):
        return RolloutStatus.INVALID
    return RolloutStatus(recorded)
