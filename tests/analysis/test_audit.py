"""The coverage audit, on a corpus small enough for a pencil."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibadv.analysis.audit import CoverageAudit, answer_coverage, audit_coverage
from calibadv.data.questions import read_questions
from calibadv.errors import RetrievalError
from calibadv.retrieval import BM25, MemoryRetriever
from calibadv.types import Document, Question, ScoredDocument

DOCUMENTS = [
    Document("0", "Prague", "Prague is the capital of Bohemia."),
    Document("1", "Arty Smith", "A party in the city-state, N.Y. style!"),
    Document("2", "New York", "It's a big city."),
]


def question(name: str, *answers: str, **metadata: Any) -> Question:
    return Question(name, name, list(answers) or ["Bohemia"], metadata=metadata)


@pytest.mark.parametrize(
    ("answer", "occurs"),
    [
        ("Bohemia", True),
        ("bohemia!", True),  # case and punctuation are no matter
        ("the New  York", True),  # nor articles and white space; it is a title
        ("capital of bohemia", True),
        ("Prague Prague", True),  # title and text are one
        ("NY style", True),
        ("big city Prague", False),  # but no document goes on in another
        ("art", False),  # not in party, and not in Arty
        ("new", True),
        ("york new", False),
        ("citystate", True),
        ("city state", False),
        ("The", False),  # nothing is left of it
        ("Brno", False),
    ],
)
def test_an_answer_occurs_as_whole_words(answer: str, occurs: bool) -> None:
    assert answer_coverage([question("q", answer)], DOCUMENTS) == float(occurs)


def test_one_of_the_answers_is_enough() -> None:
    asked = [question("a", "Brno", "York"), question("b", "York"), question("c", "Brno", "The"), question("d", "A")]
    assert answer_coverage(asked, DOCUMENTS) == 2 / 4


WORD = st.text("abc", min_size=1, max_size=2)
WORDS = st.lists(WORD, min_size=1, max_size=6).map(" ".join)


@given(texts=st.lists(WORDS, min_size=1, max_size=6), answers=st.lists(WORDS, min_size=1, max_size=6))
def test_coverage_equals_looking_for_each_answer_in_each_document(texts: list[str], answers: list[str]) -> None:
    documents = [Document(str(row), "", text) for row, text in enumerate(texts)]
    asked = [question(str(row), answer) for row, answer in enumerate(answers)]

    def words(text: str) -> list[str]:
        return [word for word in text.split() if word != "a"]

    def within(answer: list[str], text: list[str]) -> bool:
        return bool(answer) and any(text[i : i + len(answer)] == answer for i in range(len(text)))

    expected = sum(any(within(words(answer), words(text)) for text in texts) for answer in answers) / len(answers)
    assert answer_coverage(asked, documents) == pytest.approx(expected)


class ReadOnce(Sequence[Document]):
    """Documents that are counted as they are read; a second pass would count on."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return len(DOCUMENTS)

    def __getitem__(self, row: Any) -> Any:
        self.reads += row < len(DOCUMENTS)
        return DOCUMENTS[row]


def test_the_corpus_is_read_once_and_no_further_than_needed() -> None:
    whole, part = ReadOnce(), ReadOnce()
    answer_coverage([question("a", "Brno"), question("b", "Bohemia")], whole)
    answer_coverage([question("a", "Prague"), question("b", "Bohemia")], part)
    assert whole.reads == 3
    assert part.reads < 3


SCRIPT = {"ids": ["1", "0", "2"], "titles": ["1"], "both": ["2"], "empty": [], "none": ["0"]}
LABELLED = [
    question("ids", supporting_ids=["0", 2]),
    question("titles", supporting_titles=["Arty Smith", "Prague"]),
    question("both", supporting_ids=["2"], supporting_titles=["Prague"]),
    question("empty", "Brno", supporting_ids=[], supporting_titles=["Prague"]),
]


def test_recall_by_hand() -> None:
    retriever = MemoryRetriever(DOCUMENTS, SCRIPT)
    found = audit_coverage([*LABELLED, question("none")], DOCUMENTS, retriever, [1, 2, 3])
    # Shares found: ids 0 1/2 1, titles 1/2 1/2 1/2, both 1 1 1 (ids come first), empty 0 0 0; none has no labels.
    # Sums 1.5, 2, 2.5 over four questions. Four of five questions have Bohemia as answer, one Brno.
    assert found == CoverageAudit(
        questions=5, answer_coverage=4 / 5, labelled=4, recall={1: 1.5 / 4, 2: 2 / 4, 3: 2.5 / 4}
    )


def test_what_is_not_known_is_none() -> None:
    found = audit_coverage([question("none")], None, MemoryRetriever(DOCUMENTS, SCRIPT), [5, 2])
    assert found == CoverageAudit(questions=1, answer_coverage=None, labelled=0, recall={5: None, 2: None})


class Watched(MemoryRetriever):
    """Keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(DOCUMENTS, SCRIPT, failing=["broken"])
        self.asked: list[tuple[list[str], int]] = []

    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        self.asked.append((list(queries), top_k))
        return super().search(queries, top_k)


def test_each_question_is_searched_for_once() -> None:
    retriever = Watched()
    asked = [question(f"q{number}", supporting_ids=["0"]) for number in range(150)]
    audit_coverage(asked, None, retriever, [2, 7, 5])
    assert [query for queries, _ in retriever.asked for query in queries] == [q.question for q in asked]
    assert {top_k for _, top_k in retriever.asked} == {7}
    assert 1 < len(retriever.asked) < 10  # in batches


def test_mistakes_and_failures() -> None:
    retriever = Watched()
    for top_k in ([], [2, 0]):
        with pytest.raises(ValueError, match=r"top_k is \[.*\]; give one or more numbers, each at least 1"):
            audit_coverage([question("ids")], DOCUMENTS, retriever, top_k)
    with pytest.raises(ValueError, match="question 'x' has 'Prague' as supporting_titles; it must be a list of titles"):
        audit_coverage([question("x", supporting_titles="Prague")], DOCUMENTS, retriever, [2])
    assert retriever.asked == []
    with pytest.raises(RetrievalError, match="broken"):
        audit_coverage([question("broken", supporting_ids=["0"])], DOCUMENTS, retriever, [2])


def test_the_embedded_world_holds_what_its_questions_need() -> None:
    from calibadv.world import embedded_world

    retriever = BM25("embedded")
    found = audit_coverage(embedded_world().questions["validation"], retriever.corpus, retriever, [2])
    assert found.answer_coverage == 1.0
    assert found.labelled == found.questions == 200


def test_real_questions(shared: Path) -> None:
    folder = shared / "data" / "hotpotqa_small"
    retriever = BM25(str(folder / "corpus.jsonl"))
    found = audit_coverage(read_questions(str(folder / "questions.jsonl")), retriever.corpus, retriever, [2, 5])
    assert (found.questions, found.labelled) == (100, 100)
    assert found.recall[2] is not None
    assert found.recall[5] is not None
    assert found.recall[2] >= 0.59
    assert found.recall[5] >= 0.75
