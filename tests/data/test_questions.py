"""Question files: FlashRAG's and Search-R1's formats, sources, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from calibadv.data.questions import read_questions
from calibadv.types import Question

PROMPT = "Answer the question. For example, <answer> Beijing </answer>. Question: who wrote it?\n"


def write_jsonl(path: Path, *records: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, *records: dict[str, Any]) -> str:
    parquet.write_table(pa.Table.from_pylist(list(records)), path)
    return str(path)


def record(question_id: str | int = "q1", **fields: Any) -> dict[str, Any]:
    return {"id": question_id, "question": "Who?", "golden_answers": ["Ann"], **fields}


def test_flashrag_lines(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "nq.jsonl",
        record(7, question=" Où est-ce? ", golden_answers=["Łódź", "Lodz"], metadata={"supporting_ids": ["d1"]}),
        record("b", metadata={"data_source": "hotpotqa"}),
        record("c", metadata={"data_source": "hotpotqa"}, data_source="musique"),
    )
    assert read_questions(path) == [
        Question("7", "Où est-ce?", ["Łódź", "Lodz"], "nq", {"supporting_ids": ["d1"]}),
        Question("b", "Who?", ["Ann"], "hotpotqa", {"data_source": "hotpotqa"}),
        Question("c", "Who?", ["Ann"], "musique", {"data_source": "hotpotqa"}),
    ]


def test_the_source_of_a_packed_file_is_its_stem(tmp_path: Path) -> None:
    path = tmp_path / "nq.dev.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(record()).encode()))
    assert read_questions(str(path))[0].data_source == "nq.dev"


def test_flashrag_parquet_equals_its_lines(tmp_path: Path) -> None:
    records = [record("a", metadata={"supporting_titles": ["T"]}), record("b", golden_answers=["x", "y"])]
    lines = write_jsonl(tmp_path / "nq.jsonl", *records)
    assert read_questions(write_parquet(tmp_path / "nq.parquet", *records)) == read_questions(lines)


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": PROMPT}],
        [
            {"role": "system", "content": "Question: no"},
            {"role": "user", "content": "Question: an example?"},
            {"role": "assistant", "content": "Question: no"},
            {"role": "user", "content": PROMPT},
        ],
        PROMPT,
    ],
)
def test_search_r1_parquet(tmp_path: Path, prompt: Any) -> None:
    path = write_parquet(
        tmp_path / "train.parquet",
        {
            "data_source": "nq",
            "prompt": prompt,
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": ["Ann", "Anna"]}},
            "extra_info": {"split": "train", "index": 4},
        },
    )
    assert read_questions(path) == [Question("4", "who wrote it?", ["Ann", "Anna"], "nq", {})]


def test_search_r1_rows_that_keep_the_question(tmp_path: Path) -> None:
    target = {"style": "rule", "ground_truth": {"target": "Ann"}}
    path = write_parquet(
        tmp_path / "train.parquet",
        {"id": "train_0", "question": "is it Question: 1?", "prompt": PROMPT, "reward_model": target},
    )
    assert read_questions(path) == [Question("train_0", "is it Question: 1?", ["Ann"], "train", {})]


def test_several_files_that_number_alike(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "nq.jsonl", record("dev_0"), record("dev_1"))
    second = write_jsonl(tmp_path / "musique.jsonl", record("dev_0"))
    assert [q.id for q in read_questions([first])] == ["dev_0", "dev_1"]
    assert [q.id for q in read_questions([first, second])] == ["nq/dev_0", "nq/dev_1", "musique/dev_0"]
    with pytest.raises(ValueError, match=r"nq.jsonl:1 repeats the id 'dev_0' of .*nq.jsonl:1; ids must be unique"):
        read_questions([first, first])
    with pytest.raises(ValueError, match=r"name at least one"):
        read_questions([])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "question file '{path}' is empty"),
        ([record(), 3], "{path}:2 is not a JSON object but int"),
        ([record(), record()], "{path}:2 repeats the id 'q1' of {path}:1"),
        ([record(golden_answers=[])], "{path}:1: question 'q1' has no golden answers"),
        ([{"id": "q1", "question": "Who?"}], "{path}:1: question 'q1' has no golden answers"),
        ([record(golden_answers=["a", " "])], "{path}:1: question 'q1' has the golden answers ['a', ' ']"),
        ([record(golden_answers=[1])], "{path}:1: question 'q1' has the golden answers [1]"),
        ([record(question=" ")], "{path}:1: question 'q1' has no text"),
        ([{"id": "q1", "prompt": "Who?", "golden_answers": ["a"]}], "{path}:1: question 'q1' has no text"),
        ([{"question": "Who?", "golden_answers": ["a"]}], "{path}:1 has the id None"),
        ([record(metadata="x")], "{path}:1 has 'x' as metadata"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, records: list[Any], message: str) -> None:
    path = write_jsonl(tmp_path / "questions.jsonl", *records)
    with pytest.raises(ValueError, match="question") as caught:
        read_questions(path)
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"question file '.*nowhere.jsonl' does not exist; give a .jsonl, .jsonl.gz, "):
        read_questions(str(tmp_path / "nowhere.jsonl"))
    for name, message in [
        ("a.csv", "has an unknown suffix; it must be one of"),
        ("a.parquet", "is not a Parquet file"),
    ]:
        (tmp_path / name).write_text("id,question")
        with pytest.raises(ValueError, match=message):
            read_questions(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"empty.parquet' is empty"):
        read_questions(str(write_empty_parquet(tmp_path / "empty.parquet")))


def write_empty_parquet(path: Path) -> Path:
    parquet.write_table(pa.table({"id": pa.array([], pa.string())}), path)
    return path


def test_real_questions(shared: Path) -> None:
    questions = read_questions(str(shared / "data" / "hotpotqa_small" / "questions.jsonl"))
    assert len(questions) == 100
    assert questions[0].golden_answers == ["a spirit"]
    assert {question.data_source for question in questions} == {"questions"}
