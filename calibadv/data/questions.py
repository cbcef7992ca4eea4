"""Reading question files in the field's formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibadv.errors import UserError
from calibadv.io.jsonl import read_jsonl
from calibadv.types import Question

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_COLUMNS = ("id", "question", "golden_answers", "data_source", "metadata", "prompt", "reward_model", "extra_info")


def read_questions(source: str | list[str]) -> list[Question]:
    """Read questions from JSON lines (plain or gzip) or Parquet.

    Fields: ``id, question, golden_answers`` (FlashRAG), optionally ``metadata`` and ``data_source``; or Search-R1's
    ``prompt`` and ``reward_model.ground_truth.target``, where the question is the ``question`` field or else what
    follows the last ``Question:`` of the last user message. The data source is ``data_source``,
    ``metadata.data_source`` or the file's name without suffix. If an id occurs in two data sources, as in files that
    merge several benchmarks, the ids of all questions become ``source/id``.
    """
    paths = [source] if isinstance(source, str) else source
    if not paths:
        raise UserError("the list of question files is empty; name at least one")
    places: dict[tuple[str, str], str] = {}
    questions: list[Question] = []
    for path in paths:
        for place, question in _read_file(Path(path)):
            key = (question.data_source, question.id)
            first = places.setdefault(key, place)
            if first is not place:
                raise UserError(
                    f"{place} repeats the id '{question.id}' of {first}; ids must be unique within a data source"
                )
            questions.append(question)
    counts = Counter(question.id for question in questions)
    if len(counts) < len(questions):
        questions = [replace(question, id=f"{question.data_source}/{question.id}") for question in questions]
    return questions


def _read_file(path: Path) -> list[tuple[str, Question]]:
    if not path.is_file():
        raise UserError(f"question file '{path}' does not exist; give a {', '.join(_SUFFIXES)} file or 'embedded'")
    suffix = next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"question file '{path}' has an unknown suffix; it must be one of {', '.join(_SUFFIXES)}")
    questions = []
    with closing(_read_parquet(path) if suffix == ".parquet" else read_jsonl(path, "question file")) as records:
        for number, record in records:
            place = f"{path}:{number}"
            questions.append((place, _parse_question(record, place, number, path.name.removesuffix(suffix))))
    if not questions:
        raise UserError(f"question file '{path}' is empty; it must hold at least one question")
    return questions


def _read_parquet(path: Path) -> Generator[tuple[int, dict[str, Any]], None, None]:
    from pyarrow import ArrowInvalid, parquet  # type: ignore[import-untyped]

    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"question file '{path}' is not a Parquet file ({error})") from error
    number = 0
    with file:
        columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
        for batch in file.iter_batches(columns=columns):
            for record in batch.to_pylist():
                number += 1
                yield number, {name: value for name, value in record.items() if value is not None}


def _parse_question(record: dict[str, Any], place: str, number: int, stem: str) -> Question:
    metadata = record.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{place} has {metadata!r:.60} as metadata; it must be an object")
    question_id = _question_id(record, place, number)
    text = record.get("question") or _question_of_prompt(record.get("prompt"))
    if not isinstance(text, str) or not text.strip():
        keys = ", ".join(record)
        raise UserError(f"{place}: question '{question_id}' has no text among its fields {keys}; add 'question'")
    return Question(
        id=question_id,
        question=text.strip(),
        golden_answers=_golden_answers(record, f"{place}: question '{question_id}'"),
        data_source=str(record.get("data_source") or metadata.get("data_source") or stem),
        metadata=metadata,
    )


def _question_id(record: dict[str, Any], place: str, number: int) -> str:
    value = record.get("id")
    if value is None and "prompt" in record:
        # Search-R1's files number their rows in extra_info; the files derived from them not always.
        extra = record.get("extra_info")
        value = extra.get("index", number) if isinstance(extra, dict) else number
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{place} has the id {value!r}; it must be a string or an integer")
    return str(value)


def _question_of_prompt(prompt: Any) -> str | None:
    if isinstance(prompt, list):
        users = [m.get("content") for m in prompt if isinstance(m, dict) and m.get("role") == "user"]
        prompt = users[-1] if users else None
    if not isinstance(prompt, str) or "Question:" not in prompt:
        return None
    return prompt.rpartition("Question:")[2]


def _golden_answers(record: dict[str, Any], who: str) -> list[str]:
    answers = record.get("golden_answers")
    if answers is None:
        answers = _nested(record, "reward_model", "ground_truth", "target")
    answers = [answers] if isinstance(answers, str) else answers
    if not answers:
        raise UserError(f"{who} has no golden answers; give it at least one, or remove it")
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise UserError(f"{who} has the golden answers {answers!r:.80}; they must be a list of non-blank strings")
    return answers


def _nested(record: dict[str, Any], *keys: str) -> Any:
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
