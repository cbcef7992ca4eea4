"""The cache of search results: hits, evictions, failures and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.retrievers import BROKEN, TEXTS, Watched, corpus_file, ids_of, memory, partial

from calibadv.errors import RetrievalError
from calibadv.retrieval import BM25, Cached


def test_unknown_queries_are_searched_for_at_once_and_once() -> None:
    inner = Watched()
    cached = Cached(inner)
    assert ids_of(cached.search(["a", "b", "a"], 3)) == [["a"], ["b"], ["a"]]
    assert ids_of(cached.search(["b", "c", "unheard", "a"], 3)) == [["b"], ["c"], [], ["a"]]
    assert ids_of(cached.search(["unheard"], 3)) == [[]]
    assert inner.asked == [["a", "b"], ["c", "unheard"]]


def test_another_top_k_is_another_search() -> None:
    inner = memory("a", "b", "c")
    cached = Cached(inner)
    assert [len(cached.search(["q"], top_k)[0]) for top_k in (1, 3, 2)] == [1, 3, 2]


def test_the_least_recently_used_query_is_forgotten() -> None:
    inner = Watched()
    cached = Cached(inner, max_queries=2)
    for query in ("a", "b", "a", "c", "a", "b"):
        assert ids_of(cached.search([query], 3)) == [[query]]
    # c pushed b out, as a had been used since; then b pushed c out.
    assert inner.asked == [["a"], ["b"], ["c"], ["b"]]
    # More queries than are kept in one call: all are answered, the last two kept.
    assert ids_of(cached.search(["c", "d", "e"], 3)) == [["c"], ["d"], ["e"]]
    cached.search(["d", "e"], 3)
    assert inner.asked[4:] == [["c", "d", "e"]]


@given(queries=st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), max_size=12), max_queries=st.integers(1, 4))
def test_a_cache_changes_nothing_but_the_work(queries: list[list[str]], max_queries: int) -> None:
    inner, plain = Watched(), Watched()
    cached = Cached(inner, max_queries=max_queries)
    for asked in queries:
        assert cached.search(asked, 3) == plain.search(asked, 3)
        assert len(cached._cache) <= max_queries
    searched = sum(map(len, inner.asked))
    lookups = sum(map(len, queries))
    assert cached.metrics() == ({"cache_hit_rate": pytest.approx(1 - searched / lookups)} if lookups else {})


def test_the_hit_rate_is_of_the_lookups_since_it_was_asked_for() -> None:
    cached = Cached(Watched(other=2.0))
    assert cached.metrics() == {"other": 2.0}
    cached.search(["a", "b", "a"], 3)  # two searches for three queries
    assert cached.metrics() == {"other": 2.0, "cache_hit_rate": pytest.approx(1 / 3)}
    cached.search(["a", "b"], 3)
    assert cached.metrics()["cache_hit_rate"] == 1.0
    assert cached.metrics() == {"other": 2.0}


def test_a_failure_is_not_kept_and_what_was_known_is() -> None:
    inner = Watched()
    cached = Cached(inner)
    cached.search(["a"], 3)
    inner.down = True
    with pytest.raises(RetrievalError, match="down"):
        cached.search(["a", "b"], 3)
    assert ids_of(cached.search(["a"], 3)) == [["a"]]
    inner.down = False
    assert ids_of(cached.search(["b"], 3)) == [["b"]]


def test_what_succeeds_beside_a_failure_is_kept() -> None:
    inner = Watched()
    cached = Cached(inner)
    assert partial(cached, "a", "broken", "b", "a") == [["a"], BROKEN, ["b"], ["a"]]
    # a, b and a again needed two searches; what failed counts when it is asked again.
    assert cached.metrics() == {"cache_hit_rate": pytest.approx(1 / 3)}
    assert partial(cached, "broken", "b", "c") == [BROKEN, ["b"], ["c"]]
    assert inner.asked == [["a", "broken", "b"], ["broken", "c"]]


def test_what_a_caller_does_with_a_list_stays_his() -> None:
    cached = Cached(memory("a", "b"))
    cached.search(["q"], 3)[0].clear()
    cached.search(["q"], 3)[0].reverse()
    assert ids_of(cached.search(["q"], 3)) == [["a", "b"]]


def test_threads_share_a_cache() -> None:
    cached = Cached(Watched(), max_queries=3)
    batches = [[doc_id, other] for doc_id in TEXTS for other in TEXTS] * 8
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: ids_of(cached.search(batch, 3)), batches))
    assert found == [[[doc_id] for doc_id in batch] for batch in batches]
    assert len(cached._cache) == 3


def test_caches_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_queries is 0; it must be at least 1"):
        Cached(memory(), max_queries=0)
    with pytest.raises(ValueError, match="top_k is 0; it must be at least 1"):
        Cached(memory(), top_k=0)
    with pytest.raises(ValueError, match="top_k is 0; it must be at least 1"):
        Cached(memory()).search(["q"], 0)
    known = BM25(corpus_file(tmp_path / "corpus.jsonl", 3))
    assert Cached(known).corpus is known.corpus
    assert [Cached(memory(top_k=5)).top_k, Cached(memory(top_k=5), top_k=2).top_k] == [5, 2]
