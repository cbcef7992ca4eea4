"""Corpora and retrievers: formats, the BM25 formula, ties, and real passages."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibadv.interfaces import RetrievalError
from calibadv.questions import read_questions
from calibadv.retrieval import BM25, MemoryRetriever, read_corpus
from calibadv.retrieval.bm25 import best_rows
from calibadv.types import Document


def write_lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def write_texts(path: Path, texts: list[str]) -> str:
    return write_lines(path, *({"id": row, "title": f"title{row}", "text": text} for row, text in enumerate(texts)))


def test_both_corpus_formats(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "corpus.jsonl",
        {"id": 0, "contents": '"Alû"\nA demon,\nin two lines.\u2028Still the second.'},
        {"id": "x", "title": "Lilu", "text": "A spirit."},
        {"id": "q", "contents": '""Heroes" (album)"\nBy David Bowie.'},
        {"id": "u", "contents": "Unquoted\nText."},
        {"id": "n", "contents": "No title at all."},
    )
    assert read_corpus(path) == [
        Document("0", "Alû", "A demon,\nin two lines.\u2028Still the second."),
        Document("x", "Lilu", "A spirit."),
        Document("q", '"Heroes" (album)', "By David Bowie."),
        Document("u", "Unquoted", "Text."),
        Document("n", "", "No title at all."),
    ]


def test_gzip_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress('\ufeff{"id": 1, "title": "Łódź", "text": "Ż"}\r\n\n \n'.encode()))
    assert read_corpus(path) == [Document("1", "Łódź", "Ż")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "corpus '{path}' is empty"),
        (b'{"id": 1, "contents": "a"}\n[1]\n', "{path}:2 is not a JSON object but list"),
        (b'{"id": 1, "contents": "a"}\n\n{"id": 2,\n', "{path}:3 is not a JSON object"),
        (b'{"id": 1, "contents": "\xff"}\n', "{path}:1 is not a JSON object"),
        (b'{"id": 1, "contents": "a"}\n{"id": "1", "contents": "b"}\n', "{path}:2 repeats the id '1' of line 1"),
        (b'{"contents": "a"}\n', "{path}:1 has the id None"),
        (b'{"id": true, "contents": "a"}\n', "{path}:1 has the id True"),
        (b'{"id": 1, "title": "a"}\n', "{path}:1 has only the keys id, title"),
        (b'{"id": 1, "title": "a", "text": null}\n', "{path}:1 has None as 'text'"),
        (gzip.compress(b'{"id": 1, "contents": "a"}\n' * 9)[:-12], "corpus '{path}' is a damaged gzip file"),
    ],
)
def test_bad_corpora_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="corpus") as caught:
        read_corpus(path)
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)


def test_a_missing_corpus_stops_the_constructor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus '.*nowhere.jsonl' does not exist; give a JSON-lines file"):
        BM25(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="is a folder"):
        BM25(str(tmp_path))


def test_a_corpus_without_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no word to search for"):
        BM25(write_lines(tmp_path / "corpus.jsonl", {"id": 1, "title": "a", "text": "? 1 the"}))


def test_the_embedded_corpus() -> None:
    documents = read_corpus("embedded")
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


DOCUMENTS = [Document("a", "A", "first"), Document("b", "B", "second")]


def test_memory_retriever_answers_as_scripted() -> None:
    retriever = MemoryRetriever(DOCUMENTS, {"who": ["b", "a"]}, top_k=2)
    found = retriever.search(["who", "Who", "who"], retriever.top_k)
    assert [[hit.document.id for hit in hits] for hits in found] == [["b", "a"], [], ["b", "a"]]
    assert [hit.score for hit in found[0]] == [1.0, 0.5]
    assert [hit.document.id for hit in retriever.search(["who"], 1)[0]] == ["b"]


def test_memory_retriever_fails_as_scripted() -> None:
    retriever = MemoryRetriever(DOCUMENTS, {"who": ["a"]}, failing=["broken"])
    with pytest.raises(RetrievalError, match="broken"):
        retriever.search(["who", "broken"], 1)
    assert len(retriever.search(["who"], 1)[0]) == 1


def test_memory_retriever_refuses_bad_scripts() -> None:
    with pytest.raises(ValueError, match="results names the document 'c', which is not in documents"):
        MemoryRetriever(DOCUMENTS, {"who": ["a", "c"]})
    with pytest.raises(ValueError, match="3 documents have only 2 different ids"):
        MemoryRetriever([*DOCUMENTS, DOCUMENTS[0]])


def test_memory_retriever_from_yaml() -> None:
    from jsonargparse import ArgumentParser

    from calibadv.interfaces import Retriever

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Retriever, "retriever")
    config = """
    class_path: calibadv.retrieval.MemoryRetriever
    init_args:
      documents:
        - {id: a, title: A, text: first}
      results: {who: [a]}
      failing: [broken]
      top_k: 1
    """
    retriever = parser.instantiate(parser.parse_args([f"--retriever={config}"])).retriever
    assert retriever.search(["who"], 3)[0][0].document == DOCUMENTS[0]
