"""Demonstrations chosen among rollouts, by their scores."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.records import answer, rollout, search

from calibadv.demonstrations.selection import rollout_files, select
from calibadv.errors import UserError
from calibadv.types import Rollout


def scored(question_id: str, score: float, think: str = "a") -> Rollout:
    return rollout(search("d", think=think), answer("gold"), question_id=question_id, score=score)


def test_the_best_are_kept_as_evenly_over_the_questions_as_there_are() -> None:
    rollouts = [
        *(scored("one", 1.0, think) for think in "abc"),
        scored("two", 0.9),
        scored("two", 0.5, "b"),
        scored("one", 1.0, "a"),
        rollout(answer("gold"), question_id="three", score=0.0),  # answers without a search
    ]
    found = select(rollouts, min_score=0.8, count=3)
    assert [r.question.id for r in found.rollouts] == ["one", "two", "one"]
    assert found.questions == 2
    assert found.left_out == {"a lower score": 1, "the same as another": 1, "not valid (invalid)": 1}


def test_files_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    with pytest.raises(UserError, match="holds no rollouts"):
        rollout_files(tmp_path)
    (tmp_path / "rollouts" / "predict-step-000000.jsonl").touch()
    assert [path.name for path in rollout_files(tmp_path)] == ["predict-step-000000.jsonl"]
    assert rollout_files(tmp_path / "x.jsonl") == [tmp_path / "x.jsonl"]
