"""Demonstrations of many questions."""

from __future__ import annotations

from typing import Any

import pytest

from calibadv.demonstrations.writing import Demonstrations, Writer
from calibadv.policy.tokenizer import CUT_MARK
from calibadv.protocol import SearchProtocol
from calibadv.retrieval import MemoryRetriever
from calibadv.types import Document, Question

DOCUMENTS = [
    Document(f"d{n}", f"Place {n}", f"Place {n} lies in Land{n}, far away from any other one.") for n in range(5)
]
QUESTIONS = [
    *(
        Question(f"q{n}", f"Where does Place {n} lie?", [f"Land{n}"], metadata={"supporting_titles": [f"Place {n}"]})
        for n in range(5)
    ),
    Question("without", "Where?", ["Land0"]),
]


def write(count: int, **settings: Any) -> Demonstrations:
    limits = {"max_turn_tokens": 40, "max_document_tokens": 100, **settings.pop("limits", {})}
    retriever = MemoryRetriever(DOCUMENTS, {d.title: [d.id] for d in DOCUMENTS}, top_k=1)

    def cut(text: str, words: int) -> str:
        kept = text.split()[:words]
        return text if len(kept) == len(text.split()) else " ".join(kept) + CUT_MARK

    given = {"wrong_turns": 0.0, "seed": 0, **settings}
    return Writer(retriever, SearchProtocol(**limits), lambda text: len(text.split()), cut, **given).write(
        QUESTIONS, count
    )


def test_each_question_has_one_before_any_has_two() -> None:
    found = write(8)
    ids = [rollout.question.id for rollout in found.rollouts]
    assert len(ids) == 8
    assert len(set(ids[:5])) == found.questions == 5
    assert [rollout.sample for rollout in found.rollouts] == [0] * 5 + [1] * 3
    assert found.left_out == {"no supporting titles": 1}
    texts = {(r.question.id, "".join(s.text for s in r.segments)) for r in found.rollouts}
    assert len(texts) == 8  # in other words
    assert all(r.format_valid and r.score == 1.0 for r in found.rollouts)
    assert write(8).rollouts == found.rollouts  # a function of the seed
    assert write(8, seed=1).rollouts != found.rollouts


def test_wordings_end_some_time() -> None:
    assert len(write(1000).rollouts) == 20  # five questions in four wordings


def test_passages_are_cut_as_they_are_shown() -> None:
    found = write(1, limits={"max_document_tokens": 5})
    [document] = found.rollouts[0].turn_documents[0] or ()
    assert document.text.endswith(f"lies in Land{document.id[1]},{CUT_MARK}")
    assert document.text in found.rollouts[0].segments[1].text


@pytest.mark.parametrize("limit", [1, 30])
def test_long_messages_are_shortened_or_left_out(limit: int) -> None:
    found = write(5, limits={"max_turn_tokens": limit})
    assert found.left_out.get("a message longer than max_turn_tokens", 0) == (5 if limit == 1 else 0)
    longest = [max(segment.num_tokens for segment in r.policy_segments) for r in found.rollouts]
    assert all(length <= limit for length in longest)
