"""Dense retrieval: ties, index folders and types, bare FAISS files, and real passages."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from support.encoders import VECTORS, word_folder

from calibadv.data.questions import read_questions
from calibadv.retrieval.bm25 import BM25
from calibadv.retrieval.dense import Dense
from calibadv.retrieval.encoders.encoder import Encoder
from calibadv.retrieval.index.build import index
from calibadv.retrieval.index.manifest import read_manifest, write_manifest
from calibadv.retrieval.index.open import open_corpus
from calibadv.types import Document, ScoredDocument


def write_corpus(path: Path, texts: list[str]) -> str:
    lines = (f'{{"id": {row}, "title": "", "text": "{text}"}}\n' for row, text in enumerate(texts))
    path.write_text("".join(lines))
    return str(path)


def ids(hits: list[ScoredDocument]) -> list[str]:
    return [hit.document.id for hit in hits]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "corpus.jsonl", ["north", "east", "north east", "up", "east", "north"])


def test_ties_come_in_the_order_of_the_corpus(encoder: str, corpus: str) -> None:
    retriever = Dense(corpus, encoder=encoder)
    # Against east (0, 4, 0): east 16, north east (2, 2, 0) 8, north and up 0.
    [hits] = retriever.search(["east"], 10)
    assert [(hit.document.id, hit.score) for hit in hits] == [
        ("1", 16.0),
        ("4", 16.0),
        ("2", 8.0),
        ("0", 0.0),
        ("3", 0.0),
        ("5", 0.0),
    ]
    [hits] = retriever.search(["east"], 4)
    assert ids(hits) == ["1", "4", "2", "0"]


def test_searches_that_find_less_than_asked(encoder: str, corpus: str) -> None:
    retriever = Dense(corpus, encoder=encoder)
    found = retriever.search(["", "up", " \n\t", "up " * 33_334], 100)
    assert [len(hits) for hits in found] == [0, 6, 0, 6]
    assert found[1] == found[3]  # 100,002 characters
    assert retriever.search([], 3) == retriever.search([""], 3)[0] == []
    with pytest.raises(ValueError, match="top_k is 0; it must be at least 1"):
        retriever.search(["up"], 0)


def test_results_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = {f"w{number}": random.standard_normal(16).tolist() for number in range(40)}
    encoder = str(word_folder(tmp_path / "words", words, similarity="cosine"))
    texts = [f"w{first} w{second}" for first, second in random.integers(40, size=(300, 2))]
    retriever = Dense(write_corpus(tmp_path / "corpus.jsonl", texts), encoder=encoder)
    queries = [f"w{first} w{second} w{third}" for first, second, third in random.integers(40, size=(30, 3))]
    found = retriever.search(queries, 7)
    assert retriever.search(queries, 7) == found
    assert [retriever.search([query], 7)[0] for query in queries] == found


@pytest.fixture
def built(tmp_path: Path, encoder: str, corpus: str) -> Path:
    index(corpus, tmp_path / "built", "faiss", encoder=encoder, query_prompt="up ", passage_prompt="east ")
    return tmp_path / "built"


def test_an_index_finds_what_its_corpus_finds(built: Path, encoder: str, corpus: str) -> None:
    retriever = Dense(index=str(built))
    queries = ["north", "east", "", "up north", "elsewhere"]
    found = retriever.search(queries, 4)
    assert found == Dense(corpus, encoder=encoder, query_prompt="up ", passage_prompt="east ").search(queries, 4)
    # Query (2, 0, 2); passages (2, 2, 0) 4, (0, 4, 0) 0, (4/3, 8/3, 0) 8/3, (0, 2, 2) 4, (0, 4, 0) 0, (2, 2, 0) 4.
    assert [(hit.document.id, round(hit.score, 5)) for hit in found[0]] == [
        ("0", 4),
        ("3", 4),
        ("5", 4),
        ("2", 2.66667),
    ]


def test_what_an_index_says_can_be_replaced(built: Path, tmp_path: Path) -> None:
    [hits] = Dense(index=str(built), query_prompt="").search(["north"], 3)
    # Query (4, 0, 0): 8, 16/3 and 8.
    assert [(hit.document.id, round(hit.score, 5)) for hit in hits] == [("0", 8), ("5", 8), ("2", 5.33333)]
    (tmp_path / "words").rename(tmp_path / "moved")
    [hits] = Dense(index=str(built), encoder=str(tmp_path / "moved")).search(["north"], 4)
    assert ids(hits) == ["0", "3", "5", "2"]


def test_what_does_not_fit_an_index_is_named(built: Path, tmp_path: Path) -> None:
    flat = word_folder(tmp_path / "flat", {"north": [1.0, 0.0]})
    mistakes = {
        r"encoder '.*flat' makes vectors of 2 dimensions, and index '.*built' holds vectors of 3": {
            "encoder": str(flat)
        },
        r"passage_prompt is 'up ', and the passages .* were encoded with 'east '; leave it": {"passage_prompt": "up "},
        r"factory is 'Flat', but index '.*built' is built already; leave factory out": {"factory": "Flat"},
        r"index '.*built' brings its own corpus; leave out corpus 'embedded'": {"corpus": "embedded"},
        r"nprobe is 4, but IndexFlatIP has no such parameter; only IVF indexes do": {"nprobe": 4},
        r"ef_search is 4, but IndexFlatIP has no such parameter; only HNSW indexes do": {"ef_search": 4},
    }
    for message, options in mistakes.items():
        with pytest.raises(ValueError, match=message):
            Dense(index=str(built), **options)


def test_each_kind_of_index_has_its_retriever(built: Path, tmp_path: Path, corpus: str) -> None:
    with pytest.raises(ValueError, match=r"index '.*built' was built with --backend faiss; give it to Dense"):
        BM25(index=str(built))
    index(corpus, tmp_path / "by words", "bm25")
    with pytest.raises(ValueError, match=r"index '.*by words' was built with --backend bm25; give it to BM25"):
        Dense(index=str(tmp_path / "by words"))


@pytest.mark.parametrize("keep", [0, 20, 30, 100])
def test_a_damaged_index_is_named(built: Path, keep: int) -> None:
    corpus, settings = open_corpus(built), read_manifest(built).settings
    file = built / "faiss.index"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"faiss.index"):
        Dense(index=str(built))
    write_manifest(built, "faiss", corpus, settings)  # now the sizes fit
    with pytest.raises(
        ValueError, match=r"index file '.*faiss.index' does not load \(.*\); it may be cut off"
    ) as caught:
        Dense(index=str(built))
    assert "\n" not in str(caught.value)
    assert "faiss::" not in str(caught.value)


def random_words(path: Path, count: int) -> tuple[str, list[str]]:
    """An encoder of that many words, and a text of each."""
    random = np.random.default_rng(1)
    words = {f"w{number}": random.standard_normal(8).tolist() for number in range(count)}
    return str(word_folder(path, words, similarity="cosine")), list(words)


def test_approximate_indexes_that_look_at_all_find_all(tmp_path: Path) -> None:
    encoder, texts = random_words(tmp_path / "words", 300)
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    queries = texts[::10]
    exact = Dense(corpus, encoder=encoder).search(queries, 5)
    inverted = Dense(corpus, encoder=encoder, factory="IVF4,Flat", nprobe=4).search(queries, 5)
    graph = Dense(corpus, encoder=encoder, factory="HNSW16", ef_search=300).search(queries, 5)
    assert [ids(hits) for hits in inverted] == [ids(hits) for hits in graph] == [ids(hits) for hits in exact]
    few = Dense(corpus, encoder=encoder, factory="IVF4,Flat", nprobe=1).search(queries, 300)
    assert all(0 < len(hits) < 300 for hits in few)


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW8", "SQ8", "IVF4,PQ2x4", "OPQ2,IVF4,PQ2x4", "PCA4,Flat"])
def test_other_types_come_back_from_the_disk(tmp_path: Path, factory: str) -> None:
    encoder, texts = random_words(tmp_path / "words", 300)
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    index(corpus, tmp_path / "built", "faiss", encoder=encoder, factory=factory)
    queries = texts[::10]
    found = Dense(index=str(tmp_path / "built")).search(queries, 5)
    assert found == Dense(corpus, encoder=encoder, factory=factory).search(queries, 5)
    # However roughly vectors are stored, what is found is nearer than most.
    words = Encoder(encoder)
    nearness = words.encode_queries(queries) @ words.encode_queries(texts).T
    for near, hits in zip(nearness, found, strict=True):
        assert near[int(hits[0].document.id)] > np.median(near)


def test_ties_of_other_types_are_ordered(encoder: str, corpus: str) -> None:
    [hits] = Dense(corpus, encoder=encoder, factory="HNSW8").search(["east"], 6)
    assert ids(hits) == ["1", "4", "2", "0", "3", "5"]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Flatt", r"factory 'Flatt' is not one that faiss makes for inner products of 3 dimensions \(could not parse"),
        ("LSH", r"factory 'LSH' is not one that faiss makes for inner products of 3 dimensions"),
        ("IVF64,Flat", "factory 'IVF64,Flat' needs at least 64 vectors to train, and the corpus has 6 documents; give"),
        ("L2norm,PQ1", "factory 'L2norm,PQ1' needs at least 256 vectors to train, and the corpus has 6"),
        ("Flat,IDMap", "factory 'Flat,IDMap' stores vector ids of its own; leave out IDMap"),
        ("RQ2x8", "factory 'RQ2x8' does not work for 6 vectors of 3 dimensions"),
    ],
)
def test_bad_factories_are_named(encoder: str, corpus: str, factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Dense(corpus, encoder=encoder, factory=factory)
    assert "\n" not in str(caught.value)


def test_bad_efforts_are_named(encoder: str, corpus: str) -> None:
    with pytest.raises(ValueError, match="nprobe is 0; it must be at least 1"):
        Dense(corpus, encoder=encoder, factory="IVF2,Flat", nprobe=0)
    with pytest.raises(ValueError, match="ef_search is -1; it must be at least 1"):
        Dense(corpus, encoder=encoder, factory="HNSW8", ef_search=-1)


@pytest.fixture
def published(tmp_path: Path) -> tuple[str, str, str]:
    """A pair as Search-R1 publishes it, and the E5 that it was made with."""
    encoder = str(word_folder(tmp_path / "e5", VECTORS, similarity="cosine"))
    corpus = tmp_path / "wiki.jsonl"
    corpus.write_text('{"id": "0", "contents": "\\"north\\"\\nup"}\n{"id": "1", "contents": "\\"east\\"\\nup"}\n')
    # passage: "north" up, and the same with east: (4, 0, 12) and (0, 4, 12), before they are made of length 1.
    vectors = np.array([[4, 0, 12], [0, 4, 12]], np.float32)
    flat = faiss.IndexFlatIP(3)
    flat.add(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    faiss.write_index(flat, str(tmp_path / "e5_Flat.index"))
    return str(tmp_path / "e5_Flat.index"), str(corpus), encoder


def test_a_published_pair_is_read_as_it_is(published: tuple[str, str, str]) -> None:
    file, corpus, encoder = published
    [hits] = Dense(corpus, index=file, encoder=encoder).search(["north"], 3)
    assert [hit.document for hit in hits] == [Document("1", "east", "up"), Document("0", "north", "up")]
    # query: north is (4, 8, 0); against (0, 4, 12) and (4, 0, 12), all of length sqrt(80) or sqrt(160).
    np.testing.assert_allclose([hit.score for hit in hits], [32 / 12800**0.5, 16 / 12800**0.5], rtol=1e-6)
    # Encoding the corpus gives the vectors of the file.
    [encoded] = Dense(corpus, encoder=encoder).search(["north"], 3)
    np.testing.assert_allclose([hit.score for hit in encoded], [hit.score for hit in hits], rtol=1e-6)


def test_mistakes_with_bare_files_are_named(published: tuple[str, str, str], tmp_path: Path, corpus: str) -> None:
    file, wiki, encoder = published
    flat = str(word_folder(tmp_path / "flat", {"north": [1.0, 0.0]}))
    distances = str(tmp_path / "distances.index")
    faiss.write_index(faiss.IndexFlatL2(3), distances)
    mistakes = {
        r"index '.*e5_Flat.index' is a bare FAISS file, .* its corpus; give corpus": (None, encoder, file),
        r"index '.*e5_Flat.index' is a bare FAISS file, .* its encoder; give encoder": (wiki, None, file),
        r"index '.*nowhere' does not exist; give a folder of 'calibadv index', or a": (wiki, encoder, f"{file}nowhere"),
        r"index file '.*e5_Flat.index' holds 2 vectors, and the corpus has 6 documents; give": (corpus, encoder, file),
        r"encoder '.*flat' makes vectors of 2 dimensions, and index '.*' holds vectors of 3": (wiki, flat, file),
        r"index file '.*distances.index' does not compare by the inner product": (wiki, encoder, distances),
        r"index file '.*wiki.jsonl' does not load": (wiki, encoder, wiki),
        r"Dense has nothing to search; give corpus \(a JSON-lines file\) or index": (None, encoder, None),
    }
    for message, (documents, name, path) in mistakes.items():
        with pytest.raises(ValueError, match=message) as caught:
            Dense(documents, encoder=name, index=path)
        assert "\n" not in str(caught.value)


@pytest.mark.long
def test_recall_on_real_passages(shared: Path) -> None:
    folder = shared / "data" / "hotpotqa_small"
    questions = read_questions(str(folder / "questions.jsonl"))
    found = Dense(str(folder / "corpus.jsonl")).search([q.question for q in questions], 5)
    for top_k, least in ((2, 0.62), (5, 0.78)):
        recalls = []
        for question, hits in zip(questions, found, strict=True):
            gold = set(question.metadata["supporting_titles"])
            recalls.append(len(gold & {hit.document.title for hit in hits[:top_k]}) / len(gold))
        assert np.mean(recalls) >= least
