"""What a retriever may answer: one outcome per query, and one line for whatever is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from calibadv.config.user_errors import user_message
from calibadv.errors import OutageError, PartialRetrievalError, RetrievalError, UserError
from calibadv.interfaces import Retriever
from calibadv.retrieval import Cached, Hybrid
from calibadv.retrieval.outcomes import search_outcomes, unwrap
from calibadv.types import Document, ScoredDocument

A, B, C = (ScoredDocument(Document(name, "T", f"text {name}"), 1.0) for name in "abc")


class Mine(Retriever):
    """A user's: answers what the test says."""

    top_k = 3

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        found: list[list[ScoredDocument]] = self.answer()
        return found


def raising(error: BaseException) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


def document(**fields: Any) -> Any:
    return ScoredDocument(Document(**{"id": "a", "title": "T", "text": "x", **fields}), 1.0)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (raising(KeyError("key")), "raised KeyError ('key'); mend it, or raise RetrievalError where a search cannot"),
        (raising(ValueError("two\nlines")), "raised ValueError (two lines); mend it"),
        (raising(ConnectionResetError()), "raised ConnectionResetError (ConnectionResetError); mend it"),
        (lambda: None, "returned None; it must be a list with a list of documents per query"),
        (lambda: "text", "returned str ('text'); it must be a list with a list of documents per query"),
        (lambda: {"result": []}, "returned dict ({'result': []}); it must be a list"),
        (lambda: [], "returned 0 results for 2 queries; it must be one list of documents per query"),
        (lambda: [[A]], "returned 1 results for 2 queries"),
        (lambda: [[A], [], []], "returned 3 results for 2 queries"),
        (lambda: [[A], None], "returned None for a query; it must be a list of ScoredDocument"),
        (lambda: [[A], "text"], "returned str ('text') for a query; it must be a list of ScoredDocument"),
        (lambda: [[A], RetrievalError("down")], "returned RetrievalError (RetrievalError('down')) for a query"),
        (lambda: [[A], ["text"]], "returned str ('text') as a document; it must be a ScoredDocument of a Document"),
        (lambda: [[{"id": "a"}], []], "returned dict ({'id': 'a'}) as a document; it must be a ScoredDocument"),
        (lambda: [[A.document], []], "returned Document (Document("),
        (lambda: [[ScoredDocument({"id": "a"}, 1.0)], []], "returned dict ({'id': 'a'}) as a document"),  # type: ignore[arg-type]
        (lambda: [[document(id=7)], []], "returned a document whose id is 7; it must be a string"),
        (lambda: [[document(title=None)], []], "returned a document whose title is None; it must be a string"),
        (lambda: [[A, document(id="x", text=None)], []], "returned a document whose text is None; it must be a string"),
        (raising(PartialRetrievalError([[A]])), "raised PartialRetrievalError with 1 results for 2 queries"),
        (raising(PartialRetrievalError([[A], "no"])), "raised PartialRetrievalError with str ('no') for a query"),  # type: ignore[list-item]
    ],
)
def test_what_is_no_answer_is_one_line_that_names_the_class(answer: Callable[[], Any], told: str) -> None:
    for retriever in (Mine(answer), Cached(Hybrid([Mine(answer)]))):
        with pytest.raises(UserError) as caught:
            search_outcomes(retriever, ["q", "r"], 3)
        assert str(caught.value).startswith(f"Mine.search {told}")
        assert "\n" not in str(caught.value)


def test_errors_that_say_enough_and_signals_pass() -> None:
    for error in (UserError("mend this"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught:
            search_outcomes(Mine(raising(error)), ["q"], 3)
        assert caught.value is error


def test_documents_beyond_top_k_are_cut_and_repeated_ones_dropped() -> None:
    again = document(id="a", text="another text")
    assert search_outcomes(Mine(lambda: [[A, again, B, A, C], (C, B)]), ["q", "r"], 2) == [[A, B], [C, B]]
    # Of one query: another may find the same.
    assert search_outcomes(Mine(lambda: [[A], [A]]), ["q", "r"], 2) == [[A], [A]]
    assert search_outcomes(Mine(lambda: [[document(title="", text="")]]), ["q"], 2) == [[document(title="", text="")]]


def test_each_query_has_its_outcome() -> None:
    down, away = RetrievalError("down"), OutageError("away", patience=3.0)
    assert search_outcomes(Mine(raising(down)), ["q", "r"], 3) == [down, down]
    assert search_outcomes(Mine(raising(PartialRetrievalError([away, [A]]))), ["q", "r"], 3) == [away, [A]]
    assert search_outcomes(Mine(lambda: []), [], 3) == []


def test_outcomes_become_what_search_returns_or_raises() -> None:
    down, away = RetrievalError("down"), OutageError("away", patience=3.0)
    assert unwrap([[A], []]) == [[A], []]
    assert unwrap([]) == []
    with pytest.raises(OutageError) as whole:
        unwrap([away, away])
    assert whole.value is away
    with pytest.raises(PartialRetrievalError, match=r"^down \(2 of 3 searches failed\)$") as some:
        unwrap([down, [A], away])
    assert some.value.results == [down, [A], away]


def test_out_of_memory_keeps_its_advice() -> None:
    error = MemoryError("CUDA out of memory")
    with pytest.raises(MemoryError) as raised:
        search_outcomes(Mine(raising(error)), ["q"], 3)
    assert str(user_message(raised.value)).startswith("there is not enough memory (CUDA out of memory)")
