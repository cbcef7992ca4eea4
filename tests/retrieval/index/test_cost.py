"""Estimates before a build: documents, disk and index sizes."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from support.corpora import write_lines

from calibadv.retrieval.corpus.size import check_disk, free_disk, sample_file
from calibadv.retrieval.index.build import index
from calibadv.retrieval.index.builders import BM25Builder
from calibadv.retrieval.index.cost import index_size
from calibadv.retrieval.index.faiss import make_index
from calibadv.retrieval.index.manifest import read_manifest
from calibadv.retrieval.index.open import open_corpus, sample_corpus


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read even by root")
@pytest.mark.parametrize("opener", [open_corpus, sample_corpus])
def test_a_corpus_that_cannot_be_read_is_not_blamed_on_the_folder(opener: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=r"corpus '/proc/self/mem' cannot be read \(Input/output error\); check its"):
        opener("/proc/self/mem")


def test_the_disk_must_hold_what_is_written(tmp_path: Path) -> None:
    check_disk(1000, 1000, tmp_path)
    with pytest.raises(
        ValueError, match=r"' needs about 3.5 GB and its disk has 1.0 GB free; free 2.5 GB there, or choose"
    ):
        check_disk(3_500_000_000, 1_000_000_000, tmp_path)
    assert free_disk(tmp_path / "not" / "there") > 0


def test_small_files_are_counted(tmp_path: Path, corpus: str) -> None:
    packed = tmp_path / "corpus.gz"
    packed.write_bytes(gzip.compress(b"\n" + Path(corpus).read_bytes() + b" \nno JSON\n"))
    for path, total in ((corpus, 3), (str(packed), 4)):
        sample = sample_corpus(path)
        assert (sample.total, sample.exact) == (total, True)
        assert sample.documents == list(open_corpus(corpus))
    assert sample_corpus("embedded").total == 600


@pytest.mark.parametrize("packed", [False, True])
def test_documents_of_large_files_are_estimated(tmp_path: Path, packed: bool) -> None:
    # 14 MB, in lines of 40 to 240 bytes that grow longer towards the end, unless the file is packed.
    rows = 100_000
    filler = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 1000)))
    pads = (row * 200 // rows if not packed else row % 200 for row in range(rows))
    lines = "".join(f'{{"id": {row}, "contents": "{filler[row % 700 :][:pad]}"}}\n' for row, pad in enumerate(pads))
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(gzip.compress(lines.encode(), 1, mtime=0) if packed else lines.encode())
    sample = sample_file(path)
    assert not sample.exact
    assert sample.total == pytest.approx(rows, rel=0.06)
    assert 1000 < len(sample.documents) <= 2000


def test_one_long_line_is_a_document(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "corpus.jsonl", {"id": 1, "contents": "word " * 4_000_000})
    sample = sample_file(Path(path))
    assert ([document.id for document in sample.documents], sample.total) == (["1"], 1)


@pytest.mark.parametrize(
    "factory",
    ["Flat", "HNSW16", "HNSW32,SQ8", "IVF64,Flat", "IVF64,PQ8x4", "PQ8x4", "SQfp16", "PCA16,Flat"],
)
def test_the_size_of_an_index_is_as_estimated(tmp_path: Path, factory: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(4000, 32)).astype(np.float32)
    made = faiss.index_factory(32, factory, faiss.METRIC_INNER_PRODUCT)
    size = index_size(made)
    assert size.known
    assert size.trained == made.is_trained
    made.train(vectors)
    made.add(vectors)
    faiss.write_index(made, str(tmp_path / "index"))
    assert size.fixed + 4000 * size.per_vector == pytest.approx((tmp_path / "index").stat().st_size, rel=0.05)


def test_the_size_of_an_unknown_index_is_that_of_its_vectors() -> None:
    size = index_size(make_index("IVF64,PQ8,Refine(Flat)", 32))
    # 32 numbers of four bytes, and a number of eight.
    assert (size.known, size.per_vector) == (False, 136)


def test_the_cost_of_an_index_of_words(tmp_path: Path) -> None:
    # Words as in texts: the one of rank r is 1/r as frequent as the first.
    rng = np.random.default_rng(0)
    ranks = np.minimum(rng.zipf(1.3, (4000, 60)), 50_000)
    corpus = write_lines(
        tmp_path / "corpus.jsonl",
        *({"id": row, "contents": " ".join(f"w{rank}" for rank in text)} for row, text in enumerate(ranks)),
    )
    cost = BM25Builder("english", None).cost(sample_corpus(corpus))
    index(corpus, tmp_path / "built", "bm25")
    written = sum(size for name, size in read_manifest(tmp_path / "built").files.items() if name.startswith("bm25/"))
    assert cost.index_bytes == pytest.approx(written, rel=0.2)


def test_the_size_of_a_converted_corpus(tmp_path: Path) -> None:
    records = ({"id": row, "title": f"title {row}", "text": "some words " * (row % 31)} for row in range(5000))
    corpus = write_lines(tmp_path / "corpus.jsonl", *records)
    index(corpus, tmp_path / "built", "bm25")
    written = sum(size for name, size in read_manifest(tmp_path / "built").files.items() if name.startswith("corpus/"))
    assert sample_corpus(corpus).corpus_bytes == pytest.approx(written, rel=0.05)
