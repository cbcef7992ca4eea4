"""The command that builds an index: what it writes, how it resumes after a kill, and what it refuses."""

from __future__ import annotations

import errno
import gzip
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray
from support.corpora import RECORDS, write_lines
from support.kills import files_of_at_most, index_files, kill_points, tree

from calibadv.retrieval.bm25 import BM25
from calibadv.retrieval.dense import Dense
from calibadv.retrieval.index.build import index
from calibadv.retrieval.index.builders import encode_shards
from calibadv.retrieval.index.manifest import read_manifest, verify_index
from calibadv.retrieval.index.open import open_corpus
from calibadv.types import Document


def test_an_index_of_words(tmp_path: Path, corpus: str, built: Path) -> None:
    manifest = read_manifest(built)
    assert (manifest.backend, manifest.documents) == ("bm25", 3)
    assert manifest.settings == {"stopwords": "english", "stemmer": None}
    assert manifest.corpus_checksum == open_corpus(corpus).checksum
    assert sorted(path.name for path in built.iterdir()) == ["bm25", "corpus", "manifest.json", "verified.json"]
    assert manifest.files == {
        name: len(content) for name, content in index_files(built).items() if name != "manifest.json"
    }
    assert list(open_corpus(built)) == list(open_corpus(corpus))
    for queries in (["city river", "fish"], ["sung", ""]):
        assert BM25(index=str(built)).search(queries, 2) == BM25(corpus).search(queries, 2)
    index(corpus, tmp_path / "own", "bm25", stopwords=["city"], stemmer="english")
    assert read_manifest(tmp_path / "own").settings == {"stopwords": ["city"], "stemmer": "english"}


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_an_index_of_meanings(tmp_path: Path, corpus: str, factory: str) -> None:
    index(corpus, tmp_path / "built", "faiss", factory=factory, passage_prompt="p: ")
    manifest = read_manifest(tmp_path / "built")
    assert manifest.settings == {
        "encoder": "minilm",
        "query_prompt": "",
        "passage_prompt": "p: ",
        "factory": factory,
        "dimension": 384,
    }
    names = ["corpus", "faiss.index", "manifest.json", "verified.json"]
    assert sorted(path.name for path in (tmp_path / "built").iterdir()) == names
    found = Dense(index=str(tmp_path / "built")).search(["a swimming mammal", "music"], 1)
    assert [hits[0].document.id for hits in found] == ["two", "3"]


def test_the_corpus_of_an_index_can_be_indexed_again(tmp_path: Path, built: Path) -> None:
    index(str(built), tmp_path / "again", "bm25")
    assert index_files(tmp_path / "again") == index_files(built)


def test_what_was_killed_is_finished_with_fewer_at_a_time_but_not_with_other_settings(
    tmp_path: Path, corpus: str
) -> None:
    index(corpus, tmp_path / "whole", "faiss")
    moments = kill_points(tmp_path / "below", lambda out: index(corpus, out, "faiss", batch_size=2), every=9)
    begun = [out for out in moments if (out / "unfinished.json").exists() and not (out / "manifest.json").exists()]
    assert len(begun) > 2
    other = write_lines(tmp_path / "other.jsonl", *RECORDS)
    for out in begun:
        before = tree(out)
        for words, line in (
            ((other, out, "faiss"), r"was begun with corpus .*corpus.jsonl.*, and this is corpus .*other.jsonl"),
            ((corpus, out, "bm25"), r"was begun with backend faiss.*, and this is backend bm25"),
            ((corpus, out, "faiss", "minilm", "HNSW8"), r"with factory Flat, and this is factory HNSW8; give what it"),
        ):
            with pytest.raises(ValueError, match=line):
                index(*words)
        assert tree(out) == before
        index(corpus, out, "faiss", batch_size=3)
        assert set(tree(out)) == set(tree(tmp_path / "whole"))
        vectors = [faiss.read_index(str(folder / "faiss.index")) for folder in (out, tmp_path / "whole")]
        np.testing.assert_allclose(*(each.reconstruct_n(0, 3) for each in vectors), atol=1e-6)


def test_a_corpus_that_changed_after_the_kill(tmp_path: Path, corpus: str) -> None:
    moments = kill_points(tmp_path / "below", lambda out: index(corpus, out, "bm25"))
    out = next(out for out in moments if (out / "corpus" / "corpus.json").exists())
    write_lines(Path(corpus), *RECORDS[:2])
    with pytest.raises(
        ValueError, match=r"was begun with corpus .*'bytes': .*; give what it was, or remove the folder"
    ):
        index(corpus, out, "bm25")


def test_the_estimate_comes_first(tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    index(corpus, tmp_path / "built", "bm25")
    output = capsys.readouterr()
    assert output.out == ""
    for line in (r"documents │ 3 ", r"disk      │ \d", r"memory    │ \d", r"time      │ about a second"):
        assert re.search(line, output.err), output.err


def test_a_kill_at_any_moment_changes_nothing(tmp_path: Path, corpus: str, built: Path) -> None:
    kills = 0
    for out in kill_points(tmp_path / "below", lambda out: index(corpus, out, "bm25")):
        if out.exists() and any(out.iterdir()) and not (out / "manifest.json").exists():
            with pytest.raises(ValueError, match=r"is unfinished; run the same|without manifest.json"):
                read_manifest(out)
        if (out / "manifest.json").exists() and not (out / "unfinished.json").exists():
            assert index_files(out) == index_files(built)
            continue
        index(corpus, out, "bm25")
        assert index_files(out) == index_files(built)
        assert not [path for path in out.rglob("*") if path.is_dir() and not any(path.iterdir())]
        kills += 1
    assert kills > 20


CHILD = """
import sys
from pathlib import Path
from calibadv.retrieval.index.build import index

index(sys.argv[1], Path(sys.argv[2]), "bm25")
"""


@pytest.mark.long
def test_a_process_that_is_killed(tmp_path: Path) -> None:
    records = ({"id": row, "contents": f"{row % 977} {row % 1009} " * 40} for row in range(40_000))
    corpus = write_lines(tmp_path / "corpus.jsonl", *records)
    index(corpus, tmp_path / "whole", "bm25")
    for name in ("unfinished.json", "corpus/shard-00000.partial", "corpus/progress.json", "corpus/corpus.json"):
        out = tmp_path / name.replace("/", "-")
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, corpus, str(out)],
            stderr=subprocess.DEVNULL,
        )
        while not (out / name).exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "manifest.json").exists()
        index(corpus, out, "bm25")
        assert index_files(out) == index_files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", r"corpus '.*' is empty; it must hold"),
        (b'{"id": 1, "contents": "ab"}\n{"id": 2}\n', r"corpus.jsonl:2 has only the keys id; a document needs"),
        (b'{"id": 1, "contents": "ab"}\n{"id": 1, "contents": "ab"}\n', r"jsonl:2 repeats the id '1' of line 1"),
        (b"{", r"corpus.jsonl:1 is not a JSON object"),
        (gzip.compress(b'{"id": 1, "contents": "ab"}\n' * 9, mtime=0)[:-12], r"corpus '.*' is a damaged gzip file"),
        (b'{"id": 1, "contents": "? 1 the"}\n', r"no word to search for"),
    ],
)
def test_a_mistake_in_the_corpus_leaves_nothing(tmp_path: Path, content: bytes, line: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(content)
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for out in ("new", "new/below", "empty"):
        with pytest.raises(ValueError, match=line):
            index(str(corpus), tmp_path / out, "bm25")
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"backend": "bm25", "factory": "Flat"}, "--factory is an option of --backend faiss, and this is bm25; leave"),
        ({"backend": "faiss", "stemmer": "english"}, "--stemmer is an option of --backend bm25, and this is faiss"),
        ({"backend": "bm25", "stopwords": "klingon"}, "klingon"),
        ({"backend": "faiss", "encoder": "no/such/folder"}, "encoder 'no/such/folder'"),
        ({"backend": "faiss", "factory": "Nope"}, "factory 'Nope' is not one that faiss makes"),
        ({"backend": "faiss", "factory": "IVF4,Flat"}, "factory 'IVF4,Flat' needs at least 4 vectors to train"),
        ({"backend": "faiss", "batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"backend": "bm25", "corpus": "nowhere.jsonl"}, "corpus 'nowhere.jsonl' does not exist"),
    ],
)
def test_a_wrong_option_writes_nothing(tmp_path: Path, corpus: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        index(**{"corpus": corpus, "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, corpus: str, built: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.tex").write_text("")
    for out, line in (
        (built, r"out '.*built' holds a finished index; name another folder, or remove it"),
        (tmp_path / "others", r"out '.*others' is not an empty folder; name another"),
        (Path(corpus), r"out '.*corpus.jsonl' is not an empty folder; name another"),
    ):
        before = tree(tmp_path)
        with pytest.raises(ValueError, match=line):
            index(corpus, out, "bm25")
        assert tree(tmp_path) == before


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path, corpus: str) -> None:
    (tmp_path / "out" / "partial").mkdir(parents=True)
    with (
        FileLock(tmp_path / "out" / "partial" / "lock"),
        pytest.raises(ValueError, match=r"another process is writing to out '.*out'; wait for it, or name another"),
    ):
        index(corpus, tmp_path / "out", "bm25")
    index(corpus, tmp_path / "out", "bm25")


@pytest.mark.parametrize("content", ["", "[1]"])
def test_a_damaged_plan_is_named(tmp_path: Path, corpus: str, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unfinished.json").write_text(content)
    with pytest.raises(ValueError, match=r"unfinished.json' is .*damaged .*; remove the folder"):
        index(corpus, tmp_path / "out", "bm25")


@pytest.mark.usefixtures("capsys")  # without it the estimate goes to a file of pytest's, and is what fails
def test_a_full_disk_is_said_and_gone_on_with(tmp_path: Path, corpus: str) -> None:
    index(corpus, tmp_path / "words", "bm25")
    index(corpus, tmp_path / "meanings", "faiss")
    backends: tuple[Literal["bm25", "faiss"], ...] = ("bm25", "faiss")
    for backend, whole in zip(backends, (tmp_path / "words", tmp_path / "meanings"), strict=True):
        sizes = {len(content) for content in index_files(whole).values()}
        for most in sorted({0, 400, *(size - 1 for size in sizes)}):
            out = tmp_path / f"{backend}-{most}"
            with files_of_at_most(most), pytest.raises((ValueError, OSError)) as caught:
                index(corpus, out, backend)
            assert out.exists()
            halves = ("*.partial", "partial/*.json", "partial/bm25", "partial/faiss.index")
            assert [half for pattern in halves for half in out.rglob(pattern)] == []
            if (out / "unfinished.json").exists():
                assert re.match(
                    r"out '.*' cannot be written \(.+\); free space there, and run the same", str(caught.value)
                )
                assert "None" not in str(caught.value)
            else:
                assert isinstance(caught.value, OSError)
            index(corpus, out, backend)
            assert index_files(out) == index_files(whole)


@pytest.mark.parametrize(("backend", "name"), [("bm25", "bm25"), ("faiss", "faiss.index")])
def test_a_disk_that_the_index_itself_does_not_fit_is_freed_of_it(
    tmp_path: Path, corpus: str, backend: Literal["bm25", "faiss"], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "out" / "partial" / name

    def fsync(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino in {path.stat().st_ino for path in (partial, *partial.rglob("*"))}:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: partial.exists() and fsync(descriptor))
        with pytest.raises(ValueError, match=r"out '.*out' cannot be written \(No space left on device\); free space"):
            index(corpus, tmp_path / "out", backend)
    assert not partial.exists()
    index(corpus, tmp_path / "out", backend)
    verify_index(tmp_path / "out")


DOCUMENTS = [Document(str(row), "", "x" * row) for row in range(25)]


def lengths(documents: Sequence[Document]) -> NDArray[np.float32]:
    return np.array([[len(document.text), 1] for document in documents], np.float32)


def test_shards_of_embeddings_that_are_there_are_kept(tmp_path: Path) -> None:
    seen: list[str] = []

    def encode(documents: Sequence[Document]) -> NDArray[np.float32]:
        if len(seen) == 10 and tmp_path.name not in seen:
            seen.append(tmp_path.name)
            raise KeyboardInterrupt
        seen.extend(document.id for document in documents)
        return lengths(documents)

    with pytest.raises(KeyboardInterrupt):
        encode_shards(DOCUMENTS, encode, tmp_path, shard_rows=10)
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings-00000.npy"]
    shards = encode_shards(DOCUMENTS, encode, tmp_path, shard_rows=10)
    assert [len(shard) for shard in shards] == [10, 10, 5]
    np.testing.assert_array_equal(np.concatenate(shards), lengths(DOCUMENTS))
    assert [name for name in seen if name != tmp_path.name] == [str(row) for row in range(25)]
