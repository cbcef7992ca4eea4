"""BM25: its formula, ties, index folders, and real passages."""

from __future__ import annotations

import io
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.corpora import write_lines

from calibadv.data.questions import read_questions
from calibadv.numerics.ranking import best_rows
from calibadv.retrieval import BM25
from calibadv.retrieval.index.bm25 import InvertedIndex
from calibadv.retrieval.index.build import index
from calibadv.retrieval.index.manifest import write_manifest
from calibadv.retrieval.index.open import open_corpus
from calibadv.types import Document


def write_texts(path: Path, texts: list[str]) -> str:
    return write_lines(path, *({"id": row, "title": f"title{row}", "text": text} for row, text in enumerate(texts)))


def test_a_missing_corpus_stops_the_constructor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus '.*nowhere.jsonl' does not exist; give a JSON-lines file"):
        BM25(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="is a folder"):
        BM25(str(tmp_path))


def test_a_corpus_without_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no word to search for"):
        BM25(write_lines(tmp_path / "corpus.jsonl", {"id": 1, "title": "a", "text": "? 1 the"}))


def test_the_embedded_corpus() -> None:
    documents = open_corpus("embedded")
    assert len(documents) == 600
    [[found]] = BM25("embedded").search([documents[17].title], 1)
    assert found.document == documents[17]


def brute_force_bm25(corpus: list[list[str]], query: list[str]) -> np.ndarray:
    """Lucene's BM25 as its definition reads: sum over query words of idf x tf / (tf + k1 (1 - b + b len / mean))."""
    mean_length = sum(map(len, corpus)) / len(corpus)
    scores = np.zeros(len(corpus))
    for row, words in enumerate(corpus):
        counts = Counter(words)
        norm = 1.5 * (1 - 0.75 + 0.75 * len(words) / mean_length)
        for word in query:
            matching = sum(word in other for other in corpus)
            idf = math.log(1 + (len(corpus) - matching + 0.5) / (matching + 0.5))
            scores[row] += idf * counts[word] / (counts[word] + norm)
    return scores


def test_words_are_scored_once_however_often_they_come(tmp_path: Path) -> None:
    texts = ["red green blue", "red red gold", "blue gold gold grey", "pink"]
    expected = brute_force_bm25([[f"title{row}", *text.split()] for row, text in enumerate(texts)], ["red", "gold"])
    query = "red " * 70_000 + "gold " * 70_000 + "unknown " * 70_000
    [found] = BM25(write_texts(tmp_path / "corpus.jsonl", texts)).search([query], 4)
    scores = {int(hit.document.id): hit.score for hit in found}
    assert scores == pytest.approx({row: 70_000 * expected[row] for row in (0, 1, 2)}, rel=1e-5)


WORDS = st.lists(st.sampled_from(["red", "green", "blue", "grey", "pink", "gold"]), min_size=1, max_size=8)


@given(corpus=st.lists(WORDS, min_size=1, max_size=12), query=WORDS, top_k=st.integers(1, 15))
def test_bm25_equals_its_formula(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[list[str]], query: list[str], top_k: int
) -> None:
    path = write_texts(tmp_path_factory.mktemp("bm25") / "corpus.jsonl", [" ".join(words) for words in corpus])
    expected = brute_force_bm25([[f"title{row}", *words] for row, words in enumerate(corpus)], query)
    [found] = BM25(path).search([" ".join(query)], top_k)
    assert len(found) == min(top_k, np.count_nonzero(expected))
    rows = [int(hit.document.id) for hit in found]
    scores = [hit.score for hit in found]
    np.testing.assert_allclose(scores, expected[rows], rtol=1e-5)
    np.testing.assert_allclose(scores, np.sort(expected)[::-1][: len(found)], rtol=1e-5)


@given(corpus=st.lists(WORDS, min_size=2, max_size=12), first=st.integers(1, 11))
def test_an_index_built_in_blocks_is_that_of_bm25s(corpus: list[list[str]], first: int) -> None:
    import bm25s

    theirs = bm25s.BM25()
    theirs.index(corpus, show_progress=False)
    ours = InvertedIndex()
    ours.add(corpus[:first])
    ours.add(corpus[first:])
    scores = ours.pop_scores(k1=1.5, b=0.75)
    assert scores["num_docs"] == len(corpus)
    for word, number in ours.vocabulary.items():
        here = slice(scores["indptr"][number], scores["indptr"][number + 1])
        found = np.zeros(len(corpus), np.float32)
        found[scores["indices"][here]] = scores["data"][here]
        np.testing.assert_array_equal(found, theirs.get_scores([word]))


def test_ties_come_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    # Fifty equal documents with better ones at rows 10 and 30, which tie with each other.
    texts = ["apple pear"] * 50
    texts[10] = texts[30] = "apple apple"
    [found] = BM25(write_texts(tmp_path / "corpus.jsonl", texts)).search(["apple"], 5)
    assert [hit.document.id for hit in found] == ["10", "30", "0", "1", "2"]


def test_best_rows() -> None:
    scores = np.array([0.0, 2.0, 1.0, 2.0, 1.0, 1.0], dtype=np.float32)
    assert best_rows(scores, 3) == [1, 3, 2]
    assert best_rows(scores, 100) == [1, 3, 2, 4, 5]
    assert best_rows(scores[:1], 3) == []


def test_searches_that_find_less_than_asked(tmp_path: Path) -> None:
    retriever = BM25(write_texts(tmp_path / "corpus.jsonl", ["red fox", "red", "blue"]))
    found = retriever.search(["red", "", "  ?", "unheard", "the of", "RED unheard"], 10)
    assert [len(hits) for hits in found] == [2, 0, 0, 0, 0, 2]
    assert retriever.search([], 3) == []


def test_titles_are_searched(tmp_path: Path) -> None:
    [[hit]] = BM25(write_texts(tmp_path / "corpus.jsonl", ["red", "blue"])).search(["title1"], 3)
    assert hit.document == Document("1", "title1", "blue")


def test_stopwords_can_be_searched(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "corpus.jsonl", ["to be or not to be", "blue"])
    assert BM25(path).search(["to be"], 3) == [[]]
    [[hit]] = BM25(path, stopwords="none").search(["to be"], 3)
    assert hit.document.id == "0"


def test_other_stopwords(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "corpus.jsonl", ["Der blaue Fluss", "the blue river"])
    german = BM25(path, stopwords="german").search(["der", "the"], 3)
    assert [len(hits) for hits in german] == [0, 1]
    own = BM25(path, stopwords=["River", "fluss"]).search(["river", "the", "Fluss"], 3)
    assert [len(hits) for hits in own] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"stopwords is 'klingon'; it must be none, a language \(english, german"):
        BM25(path, stopwords="klingon")


def test_stemming_meets_other_forms(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "corpus.jsonl", ["directed a film", "blue"])
    assert BM25(path).search(["films directing"], 3) == [[]]
    [[hit]] = BM25(path, stemmer="english").search(["films directing"], 3)
    assert hit.document.id == "0"
    with pytest.raises(ValueError, match=r"stemmer is 'klingon'; it must be one of .*english"):
        BM25(path, stemmer="klingon")


def test_stemming_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Stemmer", None)  # as if it was not installed
    with pytest.raises(
        ValueError, match=r"needs the package PyStemmer; install it with pip install 'calibadv\[stem\]'"
    ):
        BM25(write_texts(tmp_path / "corpus.jsonl", ["red"]), stemmer="english")


COLOURS = ["red fox foxes", "a red, red rose", "blue", "red fox foxes", "grey foxes", "the rose"]


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """An index folder with settings that are not the default, and what it was built of beside it."""
    corpus = write_texts(tmp_path / "corpus.jsonl", COLOURS)
    index(corpus, tmp_path / "built", "bm25", stopwords="none", stemmer="english")
    return tmp_path / "built"


def test_an_index_finds_what_its_corpus_finds(built: Path) -> None:
    retriever = BM25(index=str(built))
    in_memory = BM25(str(built.parent / "corpus.jsonl"), stopwords="none", stemmer="english")
    queries = ["red", "foxes", "the", "fox rose", "", "unheard", "blue title4"]
    found = retriever.search(queries, 4)
    assert found == in_memory.search(queries, 4)
    assert [hit.document.id for hit in found[1]] == ["0", "3", "4"]
    # Neither what is searched beside it nor how often changes a result.
    assert [retriever.search([query], 4)[0] for query in queries] == found
    assert BM25(index=str(built), stopwords="none", stemmer="english").search(queries, 4) == found


def test_an_index_keeps_its_settings(built: Path) -> None:
    with pytest.raises(ValueError, match=r"stopwords is 'english', and index '.*' was built with 'none'; leave stop"):
        BM25(index=str(built), stopwords="english")
    with pytest.raises(
        ValueError, match=r"stemmer is 'german', and index '.*' was built with 'english'; leave stemmer"
    ):
        BM25(index=str(built), stemmer="german")


def test_what_is_searched_is_said_once(built: Path) -> None:
    with pytest.raises(ValueError, match=r"BM25 has nothing to search; give corpus \(a JSON-lines file\) or index"):
        BM25()
    with pytest.raises(ValueError, match=r"index '.*' brings its own corpus; leave out corpus 'embedded' \(set it to"):
        BM25("embedded", index=str(built))


def replace_file(built: Path, name: str, content: bytes) -> None:
    """Put another file into an index, and take it into the manifest, which would tell by its size."""
    corpus, settings = open_corpus(built), {"stopwords": "none", "stemmer": "english"}
    (built / "bm25" / name).write_bytes(content)
    write_manifest(built, "bm25", corpus, settings)


@pytest.mark.parametrize(
    ("name", "keep"),
    [("data.csc.index.npy", 150), ("indptr.csc.index.npy", 0), ("vocab.index.json", 9), ("params.index.json", 0)],
)
def test_a_damaged_index_is_named(built: Path, name: str, keep: int) -> None:
    replace_file(built, name, (built / "bm25" / name).read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"index '.*built' does not load \(.*\); copy it again, or build it anew"
    ) as caught:
        BM25(index=str(built))
    assert "\n" not in str(caught.value)


def test_files_of_two_indexes_are_told(built: Path) -> None:
    index(str(built.parent / "corpus.jsonl"), built.parent / "other", "bm25", stopwords="none")
    replace_file(built, "vocab.index.json", (built.parent / "other" / "bm25" / "vocab.index.json").read_bytes())
    with pytest.raises(ValueError, match="its files do not belong together"):
        BM25(index=str(built))


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_loading_unpickles_nothing(built: Path) -> None:
    made = built.parent / "made"
    file = io.BytesIO()
    np.save(file, np.array([Payload(made)], dtype=object), allow_pickle=True)
    replace_file(built, "data.csc.index.npy", file.getvalue())
    with pytest.raises(ValueError, match="does not load"):
        BM25(index=str(built))
    assert not made.exists()


def test_top_k_below_one_is_refused(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "corpus.jsonl", ["red"])
    with pytest.raises(ValueError, match="top_k is 0; it must be at least 1"):
        BM25(path, top_k=0)
    with pytest.raises(ValueError, match="top_k is -1; it must be at least 1"):
        BM25(path).search(["red"], -1)


@pytest.mark.parametrize(("top_k", "least"), [(2, 0.59), (5, 0.75)])
def test_recall_on_real_passages(shared: Path, top_k: int, least: float) -> None:
    folder = shared / "data" / "hotpotqa_small"
    questions = read_questions(str(folder / "questions.jsonl"))
    found = BM25(str(folder / "corpus.jsonl")).search([q.question for q in questions], top_k)
    recalls = []
    for question, hits in zip(questions, found, strict=True):
        gold = set(question.metadata["supporting_titles"])
        recalls.append(len(gold & {hit.document.title for hit in hits}) / len(gold))
    assert np.mean(recalls) >= least
