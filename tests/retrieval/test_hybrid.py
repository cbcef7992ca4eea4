"""Reciprocal rank fusion: by hand, by its definition, with failures, and on real questions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.retrievers import BROKEN, TEXTS, Watched, corpus_file, ids_of, memory, partial

from calibadv.analysis.audit import audit_coverage
from calibadv.data.questions import read_questions
from calibadv.errors import RetrievalError
from calibadv.interfaces import Retriever
from calibadv.retrieval import BM25, Dense, Hybrid
from calibadv.retrieval.hybrid import reciprocal_rank_fusion


def test_reciprocal_ranks_are_added() -> None:
    [hits] = Hybrid([memory("a", "b", "c"), memory("c", "a", "d")], fetch_k=3).search(["q"], 4)
    # a: 1/61 + 1/62, c: 1/63 + 1/61, b: 1/62, d: 1/63
    assert [(hit.document.id, hit.score) for hit in hits] == [
        ("a", pytest.approx(0.0163934 + 0.0161290, abs=1e-7)),
        ("c", pytest.approx(0.0158730 + 0.0163934, abs=1e-7)),
        ("b", pytest.approx(0.0161290, abs=1e-7)),
        ("d", pytest.approx(0.0158730, abs=1e-7)),
    ]


def test_a_smaller_rrf_k_makes_the_first_ranks_weigh_more() -> None:
    lists = [memory("a", "b", "c"), memory("d", "b", "c")]
    # rrf_k 0: a and d 1, b 1/2 + 1/2 = 1, c 2/3; a tie of three, in the order of appearance a, b, d
    assert ids_of(Hybrid(lists, rrf_k=0).search(["q"], 4)) == [["a", "b", "d", "c"]]
    assert ids_of(Hybrid(lists).search(["q"], 4)) == [["b", "c", "a", "d"]]


def test_what_is_fetched_decides() -> None:
    lists = [memory("a", "c"), memory("b", "c")]
    # c is second in both: 2/62 > 1/61, but with one document from each it is not seen.
    assert ids_of(Hybrid(lists, top_k=1, fetch_k=2).search(["q"], 1)) == [["c"]]
    assert ids_of(Hybrid(lists, top_k=1, fetch_k=1).search(["q"], 1)) == [["a"]]
    # A search for more than fetch_k fetches as many.
    assert ids_of(Hybrid(lists, top_k=1, fetch_k=1).search(["q"], 2)) == [["c", "a"]]


@given(orders=st.lists(st.permutations(list(TEXTS)), min_size=3, max_size=5))
def test_scores_do_not_depend_on_the_order_of_the_retrievers(orders: list[list[str]]) -> None:
    """To the last bit: else documents with the same ranks would not tie."""
    lists = [memory(*order).search(["q"], 5)[0] for order in orders]
    forward, backward = (reciprocal_rank_fusion(order, 60) for order in (lists, lists[::-1]))
    assert {hit.document.id: hit.score for hit in forward} == {hit.document.id: hit.score for hit in backward}


@given(orders=st.lists(st.permutations(list(TEXTS)), min_size=1, max_size=4), top_k=st.integers(1, 6))
def test_fusion_equals_its_definition(orders: list[list[str]], top_k: int) -> None:
    [hits] = Hybrid([memory(*order) for order in orders], fetch_k=6).search(["q"], top_k)
    expected = {doc_id: sum(1 / (61 + order.index(doc_id)) for order in orders) for doc_id in TEXTS}
    best = sorted(orders[0], key=lambda doc_id: (-round(expected[doc_id], 12), orders[0].index(doc_id)))
    assert [hit.document.id for hit in hits] == best[:top_k]
    assert [hit.score for hit in hits] == pytest.approx([expected[doc_id] for doc_id in best[:top_k]])


def test_each_query_is_fused_on_its_own() -> None:
    hybrid = Hybrid([memory("a", query="x"), memory("b", query="y")])
    assert ids_of(hybrid.search(["y", "", "x"], 3)) == [["b"], [], ["a"]]
    assert hybrid.search([], 3) == []


def test_a_query_that_one_retriever_fails_fails_alone() -> None:
    for retrievers in ([Watched(), memory("a")], [memory("a"), Watched()]):
        assert partial(Hybrid(retrievers), "a", "broken", "b") == [["a"], BROKEN, ["b"]]
    down = Watched()
    down.down = True
    with pytest.raises(RetrievalError, match=r"^down$"):
        Hybrid([memory("a"), down]).search(["a", "b"], 3)


def test_hybrids_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="retrievers is empty; name at least one"):
        Hybrid([])
    with pytest.raises(ValueError, match="fetch_k is 2; it must be at least top_k, which is 3"):
        Hybrid([memory()], fetch_k=2)
    with pytest.raises(ValueError, match="top_k is 0; it must be at least 1"):
        Hybrid([memory()], top_k=0)
    with pytest.raises(ValueError, match="rrf_k is -1; it must be at least 0"):
        Hybrid([memory()], rrf_k=-1)
    with pytest.raises(ValueError, match="top_k is 0; it must be at least 1"):
        Hybrid([memory()]).search(["q"], 0)
    two, three = (BM25(corpus_file(tmp_path / f"{count}.jsonl", count)) for count in (2, 3))
    with pytest.raises(ValueError, match=r"search corpora of 2 and 3 documents; .* give all of them the same corpus"):
        Hybrid([three, two])
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "a", "title": "A", "text": "another"}\n{"id": "b", "title": "B", "text": "text"}\n')
    first, again = (BM25(corpus_file(tmp_path / f"{name}.jsonl", 2)) for name in ("first", "again"))
    Hybrid([first, again])
    with pytest.raises(ValueError, match=r"search different corpora of 2 documents each; .* give all of them the same"):
        Hybrid([first, BM25(str(other))])


def test_metrics_and_corpus_come_from_what_is_fused(tmp_path: Path) -> None:
    known = BM25(corpus_file(tmp_path / "corpus.jsonl", 3))
    hybrid = Hybrid([Watched(cache_hit_rate=0.5, other=3.0), known, Watched(cache_hit_rate=0.25)])
    assert hybrid.metrics() == {"cache_hit_rate": 0.375, "other": 3.0}
    assert hybrid.corpus is known.corpus


@pytest.mark.long
def test_hybrid_is_at_least_as_good_as_both_on_real_questions(shared: Path) -> None:
    folder = shared / "data" / "hotpotqa_small"
    corpus, questions = str(folder / "corpus.jsonl"), read_questions(str(folder / "questions.jsonl"))
    parts: list[Retriever] = [BM25(corpus), Dense(corpus)]
    words, meaning, fused = (
        audit_coverage(questions, None, retriever, [5]).recall[5] for retriever in (*parts, Hybrid(parts))
    )
    assert words is not None
    assert meaning is not None
    assert fused is not None
    assert fused >= max(words, meaning)
