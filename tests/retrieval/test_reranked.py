"""Reranking: the model's own scores, ties, truncation, and models that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.retrievers import BROKEN, DOCUMENTS, TEXTS, Watched, corpus_file, ids_of, memory, partial
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
)

from calibadv.errors import RetrievalError
from calibadv.retrieval import BM25, Cached, Dense, Hybrid, MemoryRetriever, Reranked
from calibadv.types import Document


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tiny random BERTs: one score, three scores, and without a classifier."""
    root = tmp_path_factory.mktemp("bert")
    words = sorted({word for text in TEXTS.values() for word in text.split()} | set(TEXTS))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(vocabulary)})
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, model in {
            "one": BertForSequenceClassification(BertConfig(num_labels=1, **shape)),
            "three": BertForSequenceClassification(BertConfig(num_labels=3, **shape)),
            "encoder": BertModel(BertConfig(**shape)),
        }.items():
            if name == "one":
                model.classifier.bias.data.fill_(-20.0)  # scores are negative, as those of many cross-encoders are
            model.save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
    return root


def own_scores(folder: Path, query: str) -> dict[str, float]:
    """What the model says of each document, one pair at a time, through transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = {}
    for document in DOCUMENTS:
        inputs = tokenizer(query, f"{document.title}\n{document.text}", return_tensors="pt")
        with torch.no_grad():
            scores[document.id] = model(**inputs).logits.item()
    return scores


def test_the_order_and_the_scores_are_the_models(bert: Path) -> None:
    retriever = MemoryRetriever(DOCUMENTS, {"fox": list(TEXTS), "dogs run": ["e", "a"]})
    found = Reranked(retriever, str(bert / "one"), batch_size=2, device="cpu").search(["fox", "", "dogs run"], 3)
    fox, dogs = own_scores(bert / "one", "fox"), own_scores(bert / "one", "dogs run")
    assert ids_of(found) == [
        sorted(fox, key=lambda doc_id: -fox[doc_id])[:3],
        [],
        sorted(["e", "a"], key=lambda doc_id: -dogs[doc_id]),
    ]
    assert {hit.document.id: hit.score for hit in found[2]} == pytest.approx({"e": dogs["e"], "a": dogs["a"]}, abs=1e-5)
    assert max(fox.values()) < 0  # which is no reason to leave a document out


def test_only_what_is_fetched_is_reranked(bert: Path) -> None:
    best = max(TEXTS, key=own_scores(bert / "one", "fox").__getitem__)
    last = [*(doc_id for doc_id in TEXTS if doc_id != best), best]
    retriever = memory(*last, query="fox")
    four, five = (Reranked(retriever, str(bert / "one"), top_k=1, fetch_k=k, device="cpu") for k in (4, 5))
    assert ids_of(five.search(["fox"], 1)) == [[best]]
    assert best not in ids_of(four.search(["fox"], 1))[0]
    assert ids_of(four.search(["fox"], 5))[0][0] == best  # more are asked for than fetch_k


def test_ties_keep_the_order_of_the_retriever(bert: Path) -> None:
    twins = [Document(doc_id, "Fox", "a fox lives in the hills") for doc_id in "zxy"]
    retriever = MemoryRetriever(twins, {"fox": ["y", "z", "x"]})
    reranked = Reranked(retriever, str(bert / "one"), batch_size=3, device="cpu")
    assert ids_of(reranked.search(["fox"], 3)) == [["y", "z", "x"]]


def test_long_documents_are_cut_where_max_length_says(bert: Path) -> None:
    long = [Document("s", "S", "fox " * 20), Document("l", "S", "fox " * 200)]
    retriever = MemoryRetriever(long, {"fox": ["s", "l"]})
    [hits] = Reranked(retriever, str(bert / "one"), batch_size=1, device="cpu", max_length=16).search(["fox"], 2)
    assert hits[0].score == pytest.approx(hits[1].score)
    [hits] = Reranked(retriever, str(bert / "one"), batch_size=1, device="cpu").search(["fox"], 2)
    assert hits[0].score != pytest.approx(hits[1].score)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("nowhere", "is not a folder; give the folder of a sentence-transformers cross-encoder, or its name on"),
        ("three", "gives 3 scores to a pair; give a cross-encoder that gives one"),
        ("encoder", "is a BertModel, whose classifier would be random; give a cross-encoder"),
        ("no config", "has no modules.json or config.json; give a folder with a saved model"),
        ("cut off", "does not load on device 'cpu' (.*header.*); give the folder of a sentence-transformers"),
        ("pickled", "has its weights in pytorch_model.bin, a pickle, which is not loaded because it may run code"),
        ("no words", "has a tokenizer without words; save the model's own tokenizer beside it"),
    ],
)
def test_models_that_do_not_load(
    bert: Path, tmp_path: Path, broken: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / broken
    if broken in ("three", "encoder"):
        folder = bert / broken
    elif broken != "nowhere":
        folder.mkdir()
        left_out = {
            "no config": "config.json",
            "cut off": "model.safetensors",
            "pickled": "model.safetensors",
            "no words": "tokenizer",
        }[broken]
        for file in (bert / "one").iterdir():
            if not file.name.startswith(left_out):
                (folder / file.name).write_bytes(file.read_bytes())
    if broken == "cut off":
        (folder / "model.safetensors").write_bytes(b"cut")
    if broken == "pickled":
        torch.save({}, folder / "pytorch_model.bin")
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"model '.*{broken}' {pattern}") as caught:
        Reranked(memory(), str(folder), device="cpu")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_model_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model 'nobody/nothing' is neither a folder nor can it be fetched") as caught:
        Reranked(memory(), "nobody/nothing")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_loading_is_quiet(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Reranked(memory("a"), str(bert / "one"), device="cpu").search(["q"], 1)
    assert capfd.readouterr() == ("", "")


def test_rerankers_that_cannot_be(bert: Path) -> None:
    one = str(bert / "one")
    with pytest.raises(ValueError, match="fetch_k is 2; it must be at least top_k, which is 3"):
        Reranked(memory(), one, fetch_k=2)
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        Reranked(memory(), one, batch_size=0)
    with pytest.raises(ValueError, match="max_length is 0; it must be at least 1"):
        Reranked(memory(), one, max_length=0)
    with pytest.raises(ValueError, match=r"max_length is 65; model '.*one' reads at most 64 tokens"):
        Reranked(memory(), one, max_length=65)
    with pytest.raises(ValueError, match=r"model '.*one' does not load on device 'abacus' \(.*\); give the"):
        Reranked(memory(), one, device="abacus")


def test_a_reranker_forwards(bert: Path, tmp_path: Path) -> None:
    known = BM25(corpus_file(tmp_path / "corpus.jsonl", 3))
    assert Reranked(known, str(bert / "one"), device="cpu").corpus is known.corpus
    watched = Reranked(Watched(cache_hit_rate=0.5), str(bert / "one"), device="cpu")
    assert watched.metrics() == {"cache_hit_rate": 0.5}
    with pytest.raises(RetrievalError, match="broken"):
        watched.search(["broken"], 1)
    assert partial(watched, "a", "broken", "b") == [["a"], BROKEN, ["b"]]


def test_one_text_is_not_a_list_of_queries(bert: Path, tmp_path: Path) -> None:
    words = BM25(corpus_file(tmp_path / "corpus.jsonl", 3))
    reranked = Reranked(words, str(bert / "one"), device="cpu")
    for retriever in (words, memory(), Hybrid([words]), Cached(words), reranked, Dense("embedded")):
        with pytest.raises(ValueError, match=r"queries is the text 'fox'; it must be a list of texts: put it in"):
            retriever.search("fox", 1)
