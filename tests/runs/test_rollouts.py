from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.records import answer, message, rollout, search

from calibadv.runs.rollouts import (
    Record,
    read_records,
    read_rollouts,
    rollout_from_json,
    rollout_to_json,
    write_records,
    write_rollouts,
)
from calibadv.types import Rollout, RolloutStatus, Segment


def record(**changes: Any) -> Record:
    """The record of a small valid rollout; a change to None removes the key."""
    base = rollout_to_json(rollout(search("a"), answer("gold"), sample=2, step=7))
    return {key: value for key, value in (base | changes).items() if value is not None}


def segments(*sources: str) -> list[Record]:
    return [{"source": source, "text": "", "num_tokens": 1} for source in sources]


def policy_segment(**changes: Any) -> Record:
    return {"source": "policy", "text": "", "num_tokens": 1} | changes


def test_the_record_of_a_rollout() -> None:
    episode = rollout(
        search("a"),
        answer("gold"),
        sample=2,
        step=7,
        data_source="toy",
        metadata={"supporting_ids": ["a"]},
        score=1.0,
        answer_score=1.0,
        step_correctness=(0.5,),
    )
    assert rollout_to_json(episode, [1.0, 1.0], [0.5, 1.0]) == {
        "question_id": "q",
        "sample": 2,
        "question": "what?",
        "golden_answers": ["gold"],
        "data_source": "toy",
        "metadata": {"supporting_ids": ["a"]},
        "prepend_think": False,
        "segments": [
            {"source": "policy", "text": message("find-a", "search", "query"), "num_tokens": 3},
            {
                "source": "environment",
                "text": "\n\n<information></information>\n\n",
                "num_tokens": 4,
                "documents": [{"id": "a", "title": "T a", "text": "about a"}],
            },
            {"source": "policy", "text": message("done", "answer", "gold"), "num_tokens": 2},
        ],
        "status": "answered",
        "step": 7,
        "format_valid": True,
        "score": 1.0,
        "answer_score": 1.0,
        "step_correctness": [0.5],
        "advantages": {"estimated": [1.0, 1.0], "calibrated": [0.5, 1.0]},
    }


def test_files_give_back_what_was_written(tmp_path: Path) -> None:
    episodes = [
        rollout(
            search("a", "b"), answer("gold \u2028 é 日本 \ud800"), score=1.0, answer_score=1.0, step_correctness=(0.5,)
        ),
        rollout(search("a"), search(think="u"), status=RolloutStatus.TRUNCATED, step_correctness=(0.0,)),
        rollout(search("a"), answer("x"), status=RolloutStatus.SEARCH_FAILED, metadata={"deep": [1, {"a": None}]}),
    ]
    path = tmp_path / "new" / "rollouts.jsonl"
    write_rollouts(path, episodes, [[1.0, 1.0], [0.0, 0.0], None], [[1.0, 0.5], [0.0, 0.0], None])
    assert list(read_rollouts(path)) == episodes
    advantages = [line["advantages"] for line, _ in read_records(path)]
    assert advantages[0] == {"estimated": [1.0, 1.0], "calibrated": [1.0, 0.5]}
    assert advantages[2] == {"estimated": None, "calibrated": None}
    assert list(path.parent.iterdir()) == [path]


texts = st.text(max_size=30) | st.sampled_from([message("a", "search", "b"), message("a", "answer", "b")])


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=5), st.booleans(), st.sampled_from(RolloutStatus))
def test_any_text_survives_the_file(parts: list[str], prepend_think: bool, status: RolloutStatus) -> None:
    sources = ("policy", "environment")
    turns = [Segment(sources[n % 2], text, num_tokens=len(text)) for n, text in enumerate(parts)]
    line = json.dumps(rollout_to_json(rollout(turns, prepend_think=prepend_think, status=status)))
    read = rollout_from_json(json.loads(line), 1)
    assert read.segments == tuple(turns)
    assert read.prepend_think == prepend_think


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n", encoding="utf-8")

    def broken() -> Iterator[Record]:
        yield {"a": 1}
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        write_records(path, broken())
    assert path.read_text(encoding="utf-8") == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def with_status(status: str | None, *, valid: bool) -> Rollout:
    text = message("t", "answer", "gold") if valid else "<think>t</think> gold"
    parts = [*record()["segments"][:-1], {"source": "policy", "text": text, "num_tokens": 1}]
    return rollout_from_json(record(status=status, segments=parts), 1)


@pytest.mark.parametrize(
    ("recorded", "valid", "expected"),
    [
        (None, True, "answered"),
        (None, False, "invalid"),
        ("answered", False, "invalid"),  # the text decides
        ("invalid", True, "answered"),
        ("truncated", False, "truncated"),  # the reason why it ended is kept
        ("out_of_turns", False, "out_of_turns"),
        ("search_failed", True, "search_failed"),
        ("search_failed", False, "search_failed"),
    ],
)
def test_the_status_is_that_of_the_text(recorded: str | None, valid: bool, expected: str) -> None:
    assert with_status(recorded, valid=valid).status == expected


def test_optional_fields_have_defaults() -> None:
    optional = ("status", "step", "format_valid", "score", "answer_score", "step_correctness", "advantages")
    bare = rollout_from_json(record(**dict.fromkeys(optional)), 1)
    assert (bare.step, bare.score, bare.answer_score, bare.step_correctness) == (0, 0.0, None, ())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"question_id": None}, "question_id is missing; add it (a string)"),
        ({"question_id": 3}, "question_id is 3; it must be a string"),
        ({"sample": True}, "sample is true; it must be a whole number"),
        ({"prepend_think": None}, "prepend_think is missing; add it (true or false)"),
        ({"golden_answers": None}, "golden_answers is missing; add it (a list)"),
        ({"golden_answers": []}, "golden_answers is empty; give at least one accepted answer"),
        ({"golden_answers": ["a", 7]}, "golden_answers[1] is 7; it must be a string"),
        ({"segments": []}, "segments is empty; a rollout has at least one policy segment"),
        ({"segments": "text"}, 'segments is "text"; it must be a list'),
        ({"segments": ["text"]}, 'segments[0] is "text"; it must be an object'),
        (
            {"segments": segments("environment", "policy")},
            "segments[0] is the environment's; segments begin with policy and alternate: join neighbours of one source",
        ),
        (
            {"segments": segments("policy", "policy")},
            "segments[1] follows another policy segment; segments begin with policy and alternate: ",
        ),
        ({"segments": segments("policy", "environment", "environment")}, "segments[2] follows another environment"),
        ({"segments": segments("user")}, "segments[0]: source is 'user'; it must be 'policy' or 'environment'"),
        ({"segments": [policy_segment(num_tokens=None)]}, "segments[0]: num_tokens is missing; add it"),
        ({"segments": [policy_segment(num_tokens=-1)]}, "segments[0]: num_tokens is -1; it must be 0 or more"),
        ({"segments": [policy_segment(num_tokens=1.5)]}, "segments[0]: num_tokens is 1.5; it must be a whole number"),
        ({"segments": [policy_segment(text=None)]}, "segments[0]: text is missing; add it"),
        (
            {"segments": [policy_segment(documents=[{"title": "T"}])]},
            "segments[0].documents[0]: id is missing; add it (a string)",
        ),
        ({"status": "done"}, 'status is "done"; it must be one of search_failed, truncated, invalid, out_of_turns'),
        ({"score": "high"}, 'score is "high"; it must be a number'),
        ({"step_correctness": [0.5, "x"]}, 'step_correctness is "x"; it must be a number'),
    ],
)
def test_a_broken_record_is_an_error_of_one_line(tmp_path: Path, changes: Record, problem: str) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_records(path, [record(), record(**changes)])
    with pytest.raises(ValueError, match="rollouts") as caught:
        list(read_rollouts(path))
    assert str(caught.value).startswith(f"{path}, line 2: {problem}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["[1]", "{broken", '"text"', "7"])
def test_a_line_that_is_no_object_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text(f"{json.dumps(record())}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rollouts\.jsonl:3 is not a JSON object"):
        list(read_rollouts(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout file '.*none\.jsonl' does not exist"):
        list(read_rollouts(tmp_path / "none.jsonl"))
