"""Retrievers around retrievers: fusion by hand, the model's own scores, and what a cache may and may not keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
)

from calibadv.analysis.audit import audit_coverage
from calibadv.data.questions import read_questions
from calibadv.interfaces import PartialRetrievalError, RetrievalError, Retriever
from calibadv.retrieval import BM25, Cached, Dense, Hybrid, MemoryRetriever, Reranked
from calibadv.retrieval.hybrid import reciprocal_rank_fusion
from calibadv.types import Document, Metrics, ScoredDocument

TEXTS = {
    "a": "rivers run through the city of hills",
    "b": "the quick brown fox jumps over lazy dogs",
    "c": "a fox lives in the hills",
    "d": "dogs run",
    "e": "the city sleeps",
}
DOCUMENTS = [Document(doc_id, doc_id.upper(), text) for doc_id, text in TEXTS.items()]


def memory(*ids: str, query: str = "q", top_k: int = 3) -> MemoryRetriever:
    return MemoryRetriever(DOCUMENTS, {query: list(ids)}, top_k, failing=["broken"])


def corpus_file(path: Path, count: int) -> str:
    lines = [json.dumps({"id": d.id, "title": d.title, "text": d.text}) for d in DOCUMENTS[:count]]
    path.write_text("\n".join(lines))
    return str(path)


def ids_of(found: list[list[ScoredDocument]]) -> list[list[str]]:
    return [[hit.document.id for hit in hits] for hits in found]


class Watched(MemoryRetriever):
    """A MemoryRetriever that keeps what it was asked, fails as long as it is told to, and reports metrics."""

    def __init__(self, **reports: float) -> None:
        super().__init__(DOCUMENTS, {doc_id: [doc_id] for doc_id in TEXTS}, failing=["broken"])
        self.asked: list[list[str]] = []
        self.down = False
        self.reports = reports

    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        self.asked.append(list(queries))
        if self.down:
            raise RetrievalError("down")
        return super().search(queries, top_k)

    def metrics(self) -> Metrics:
        return dict(self.reports)


# Hybrid


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


def partial(retriever: Retriever, *queries: str) -> list[list[str] | str]:
    """What each query found, or why it failed, of a search that failed for some."""
    with pytest.raises(PartialRetrievalError) as caught:
        retriever.search(list(queries), 3)
    results = caught.value.results
    return [str(result) if isinstance(result, RetrievalError) else ids_of([result])[0] for result in results]


BROKEN = "the search for 'broken' is scripted to fail"


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


# Reranked


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


# Cached


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


# all retrievers


def test_one_text_is_not_a_list_of_queries(bert: Path, tmp_path: Path) -> None:
    words = BM25(corpus_file(tmp_path / "corpus.jsonl", 3))
    reranked = Reranked(words, str(bert / "one"), device="cpu")
    for retriever in (words, memory(), Hybrid([words]), Cached(words), reranked, Dense("embedded")):
        with pytest.raises(ValueError, match=r"queries is the text 'fox'; it must be a list of texts: put it in"):
            retriever.search("fox", 1)
