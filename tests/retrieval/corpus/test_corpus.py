"""Corpora: formats, access by row and by id, conversion, and the cache of converted files."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from support.kills import kill_points, tree

from calibadv.retrieval.corpus.arrow import ArrowCorpus, id_hash
from calibadv.retrieval.corpus.base import Corpus
from calibadv.retrieval.corpus.convert import NumberedDocuments, Source, convert, find_duplicate
from calibadv.retrieval.index.open import open_corpus, open_source
from calibadv.types import Document

Opener = Callable[[Path], Corpus]
DOCUMENTS = [Document(f"d{row}", f"title {row}", "x" * row) for row in range(23)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALIBADV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpora"


@pytest.fixture(params=["in memory", "converted"])
def opener(request: pytest.FixtureRequest) -> Opener:
    return open_corpus if request.param == "in memory" else partial(open_corpus, in_memory_bytes=0)


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def source_of(documents: list[Document]) -> Source:
    def read(after: int) -> NumberedDocuments:
        yield from enumerate(documents[after:], after + 1)

    return Source("test", {"documents": [document.id for document in documents]}, read)


def test_both_formats(tmp_path: Path, opener: Opener) -> None:
    path = write_lines(
        tmp_path / "corpus.jsonl",
        {"id": "0", "contents": '"Alû"\nA demon,\nin two lines.\u2028Still the second.'},
        {"id": "x", "title": "Lilu", "text": "A spirit."},
        {"id": "q", "contents": '""Heroes" (album)"\nBy David Bowie.'},
        {"id": "u", "contents": "Unquoted\nText."},
        {"id": "n", "contents": "No title at all."},
        {"id": 7, "title": "", "text": "NUL \u0000 and 夢 🚂"},
    )
    assert list(opener(path)) == [
        Document("0", "Alû", "A demon,\nin two lines.\u2028Still the second."),
        Document("x", "Lilu", "A spirit."),
        Document("q", '"Heroes" (album)', "By David Bowie."),
        Document("u", "Unquoted", "Text."),
        Document("n", "", "No title at all."),
        Document("7", "", "NUL \u0000 and 夢 🚂"),
    ]


def test_gzip_byte_order_mark_and_blank_lines(tmp_path: Path, opener: Opener) -> None:
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress('\ufeff{"id": 1, "title": "Łódź", "text": "Ż"}\r\n\n \n'.encode(), mtime=0))
    assert list(opener(path)) == [Document("1", "Łódź", "Ż")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n", "corpus '{path}' is empty"),
        (b'{"id": 1, "contents": "a"}\n[1]\n', "{path}:2 is not a JSON object but list"),
        (b'{"id": 1, "contents": "a"}\n\n{"id": 2,\n', "{path}:3 is not a JSON object"),
        (b'{"id": 1, "contents": "\xff"}\n', "{path}:1 is not a JSON object"),
        (b'{"id": 1, "contents": "a"}\n\n{"id": "1", "contents": "b"}\n', "{path}:3 repeats the id '1' of line 1"),
        (b'{"contents": "a"}\n', "{path}:1 has the id None"),
        (b'{"id": true, "contents": "a"}\n', "{path}:1 has the id True"),
        (b'{"id": 1, "title": "a"}\n', "{path}:1 has only the keys id, title"),
        (b'{"id": 1, "title": "a", "text": null}\n', "{path}:1 has None as 'text'"),
        (b'{"id": 1, "contents": "a \\ud83d b"}\n', "{path}:1 has '\\ud83d', half of a surrogate pair"),
        (gzip.compress(b'{"id": 1, "contents": "a"}\n' * 9, mtime=0)[:-12], "corpus '{path}' is a damaged gzip file"),
    ],
)
def test_bad_corpora_are_named(tmp_path: Path, cache: Path, opener: Opener, content: bytes, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="corpus") as caught:
        opener(path)
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)
    assert [left.suffix for left in cache.glob("*")] in ([], [".lock"])


def test_the_first_repetition_is_named(tmp_path: Path, opener: Opener) -> None:
    ids = ["a", "b", "c", "b", "a", "b"]
    path = write_lines(tmp_path / "corpus.jsonl", *({"id": doc_id, "contents": ""} for doc_id in ids))
    with pytest.raises(ValueError, match=r"corpus.jsonl:4 repeats the id 'b' of line 2; ids must be unique"):
        opener(path)


def test_repetitions_are_found_across_shards(tmp_path: Path) -> None:
    documents = [*DOCUMENTS, DOCUMENTS[3]]
    with pytest.raises(ValueError, match="test:24 repeats the id 'd3' of line 4"):
        convert(source_of(documents), tmp_path / "out", shard_rows=4)
    with pytest.raises(ValueError, match="documents:24 repeats the id 'd3' of line 4"):
        Corpus.from_documents(documents)


def test_equal_hashes_are_settled_by_the_ids() -> None:
    hashes, rows = np.array([1, 5, 5, 5, 8, 8], np.uint64), np.array([4, 0, 2, 3, 1, 5], np.uint64)
    assert find_duplicate(hashes, rows, "abcdef".__getitem__) is None
    assert find_duplicate(hashes, rows, "abcbeb".__getitem__) == (1, 5)
    assert find_duplicate(hashes, rows, "abacec".__getitem__) == (0, 2)


def test_an_id_is_not_taken_for_another_of_the_same_hash(tmp_path: Path) -> None:
    corpus = convert(source_of(DOCUMENTS[:3]), tmp_path / "out")
    wanted, absent = id_hash("d1"), id_hash("absent")
    # As if all three had the hash of d1, and then that of an id that is not there.
    np.save(tmp_path / "out" / "ids.npy", np.array([[wanted] * 3, [0, 1, 2]], np.uint64))
    assert ArrowCorpus(corpus.folder).row("d1") == 1
    np.save(tmp_path / "out" / "ids.npy", np.array([[absent] * 3, [0, 1, 2]], np.uint64))
    with pytest.raises(ValueError, match="none of the 3 documents has the id 'absent'"):
        ArrowCorpus(corpus.folder).row("absent")


def test_hashes_are_the_same_on_every_machine() -> None:
    # blake2b is specified in RFC 7693; `printf d1 | b2sum -l 64` prints these bytes, the lowest first.
    assert id_hash("d1").to_bytes(8, "little").hex() == "fcd38eb77616f227"


@pytest.fixture(params=[1, 4, 8, 23, 100])
def converted(request: pytest.FixtureRequest, tmp_path: Path) -> ArrowCorpus:
    return convert(source_of(DOCUMENTS), tmp_path / "out", shard_rows=request.param)


def test_rows_slices_and_iteration(converted: ArrowCorpus) -> None:
    assert len(converted) == 23
    assert list(converted) == DOCUMENTS
    assert [converted[row] for row in range(-23, 23)] == [*DOCUMENTS, *DOCUMENTS]
    assert converted[np.int64(7)] == DOCUMENTS[7]
    for taken in (slice(None), slice(2, 19), slice(3, 4), slice(5, 5), slice(-3, None), slice(20, 99), slice(9, 2)):
        assert converted[taken] == DOCUMENTS[taken]
        assert converted[taken.start : taken.stop : 3] == DOCUMENTS[taken.start : taken.stop : 3]
        assert converted[taken.start : taken.stop : -2] == DOCUMENTS[taken.start : taken.stop : -2]
    for row in (23, -24):
        with pytest.raises(IndexError):
            converted[row]


def test_a_converted_corpus_is_opened_again_as_it_was(converted: ArrowCorpus) -> None:
    again = ArrowCorpus(converted.folder)
    assert list(again) == DOCUMENTS
    assert again.checksum == converted.checksum == Corpus.from_documents(DOCUMENTS).checksum
    assert [again.row(document.id) for document in DOCUMENTS] == list(range(23))


def test_threads_share_a_corpus(converted: ArrowCorpus) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(converted.__getitem__, [*range(23)] * 20)) == DOCUMENTS * 20


IDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), min_size=1, max_size=40, unique=True)


@given(ids=IDS, others=IDS, shard_rows=st.integers(1, 9))
def test_every_id_is_found_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], others: list[str], shard_rows: int
) -> None:
    documents = [Document(doc_id, "", "") for doc_id in ids]
    expected = {doc_id: row for row, doc_id in enumerate(ids)}
    folder = tmp_path_factory.mktemp("ids") / "out"
    for corpus in (convert(source_of(documents), folder, shard_rows), Corpus.from_documents(documents)):
        assert {doc_id: corpus.row(doc_id) for doc_id in ids} == expected
        for doc_id in set(others) - set(ids):
            with pytest.raises(ValueError, match=rf"none of the {len(ids)} documents has the id"):
                corpus.row(doc_id)


def test_the_checksum_is_of_the_documents_and_not_of_the_file(tmp_path: Path) -> None:
    records = [{"id": d.id, "title": d.title, "text": d.text} for d in DOCUMENTS]
    plain = write_lines(tmp_path / "plain.jsonl", *records)
    contents = [{"contents": f'"{d.title}"\n{d.text}', "id": d.id} for d in DOCUMENTS]
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(write_lines(tmp_path / "contents.jsonl", *contents).read_bytes()))
    checksums = {open_corpus(path, limit).checksum for path in (plain, packed) for limit in (0, 1 << 20)}
    assert checksums == {Corpus.from_documents(DOCUMENTS).checksum}


@pytest.mark.parametrize(
    "other",
    [
        [Document("a", "b", "cd"), Document("e", "", "")],
        [Document("a", "bc", "d")],
        [Document("ab", "", "cd")],
        [Document("a", "b", "cD")],
        [Document("a", "b", "")],
    ],
)
def test_the_checksum_differs_where_the_documents_do(other: list[Document]) -> None:
    assert Corpus.from_documents(other).checksum != Corpus.from_documents([Document("a", "b", "cd")]).checksum


def test_the_checksum_depends_on_the_order() -> None:
    assert Corpus.from_documents(DOCUMENTS).checksum != Corpus.from_documents(DOCUMENTS[::-1]).checksum


def test_the_embedded_corpus() -> None:
    corpus = open_corpus("embedded")
    assert len(corpus) == 600
    assert corpus[corpus.row(corpus[17].id)] == corpus[17]


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 3, 4, 11, 22])
def test_a_stopped_conversion_goes_on_behind_its_last_whole_shard(tmp_path: Path, stop: int) -> None:
    convert(source_of(DOCUMENTS), tmp_path / "whole", shard_rows=4)
    asked: list[int] = []

    def read(after: int) -> NumberedDocuments:
        asked.append(after)
        for number, document in enumerate(DOCUMENTS[after:], after + 1):
            if len(asked) == 1 and number > stop:
                raise StoppedError
            yield number, document

    source = Source("test", source_of(DOCUMENTS).identity, read)
    with pytest.raises(StoppedError):
        convert(source, tmp_path / "stopped", shard_rows=4)
    with pytest.raises(ValueError, match=r"corpus.json' is missing"):
        ArrowCorpus(tmp_path / "stopped")
    convert(source, tmp_path / "stopped", shard_rows=4)
    assert asked == [0, stop // 4 * 4]
    assert tree(tmp_path / "stopped") == tree(tmp_path / "whole")


def test_a_kill_at_any_moment_changes_nothing(tmp_path: Path) -> None:
    convert(source_of(DOCUMENTS[:10]), tmp_path / "whole", shard_rows=4)
    kills = 0
    for folder in kill_points(tmp_path, lambda out: convert(source_of(DOCUMENTS[:10]), out, shard_rows=4)):
        convert(source_of(DOCUMENTS[:10]), folder, shard_rows=4)
        assert tree(folder) == tree(tmp_path / "whole")
        kills += 1
    assert kills > 10  # three shards, and several files beside them


def test_what_was_left_of_another_source_is_not_gone_on_with(tmp_path: Path) -> None:
    def read(after: int) -> NumberedDocuments:
        yield from enumerate(DOCUMENTS[:9], 1)
        raise StoppedError

    with pytest.raises(StoppedError):
        convert(Source("other", {"other": 1}, read), tmp_path / "out", shard_rows=4)
    assert (tmp_path / "out" / "shard-00001.arrow").exists()
    assert list(convert(source_of(DOCUMENTS[9:12]), tmp_path / "out", shard_rows=4)) == DOCUMENTS[9:12]
    assert not (tmp_path / "out" / "shard-00001.arrow").exists()


def test_a_large_file_is_converted_once(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "large.jsonl", {"id": 1, "contents": "a"})
    for _ in range(2):
        assert list(open_corpus(path, in_memory_bytes=10)) == [Document("1", "", "a")]
    [folder] = [path for path in cache.iterdir() if path.is_dir()]
    assert capsys.readouterr().err == f"converting '{path}' once, into '{folder}'\n"
    write_lines(path, {"id": 1, "contents": "changed"})
    assert list(open_corpus(path, in_memory_bytes=10)) == [Document("1", "", "changed")]
    open_corpus(path, in_memory_bytes=1000)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_of_several_that_ask_at_once_one_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "large.jsonl", *({"id": row, "contents": f"{row}"} for row in range(5000)))
    with ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(partial(open_corpus, in_memory_bytes=0), [path] * 4))
    assert {(len(corpus), corpus.checksum) for corpus in corpora} == {(5000, open_corpus(path).checksum)}
    assert capsys.readouterr().err.count("converting") == 1


def test_who_waits_for_another_process_says_so(tmp_path: Path, cache: Path) -> None:
    path = write_lines(tmp_path / "large.jsonl", {"id": 1, "contents": "a"})
    open_corpus(path, in_memory_bytes=0)
    [folder] = [path for path in cache.iterdir() if path.is_dir()]
    shutil.rmtree(folder)
    # Not capsys, which loses what is written while it is read.
    with ThreadPoolExecutor(1) as pool, redirect_stderr(StringIO()) as errors:
        with FileLock(folder.with_suffix(".lock")):
            opened = pool.submit(open_corpus, path, in_memory_bytes=0)
            while "\n" not in errors.getvalue():
                assert not opened.done()
            said = errors.getvalue()
        assert list(opened.result()) == [Document("1", "", "a")]
    assert said == f"waiting for another process, which converts '{path}' into '{folder}'\n"


def test_a_damaged_file_of_the_cache_is_refused(tmp_path: Path, cache: Path) -> None:
    path = write_lines(tmp_path / "large.jsonl", {"id": 1, "contents": "a"})
    open_corpus(path, in_memory_bytes=0)
    [folder] = [path for path in cache.iterdir() if path.is_dir()]
    for name in ("corpus.json", "ids.npy", "shard-00000.arrow"):
        whole = (folder / name).read_bytes()
        changed = whole.replace(b'"checksum": "', b'"checksum": "0') if name == "corpus.json" else whole[:-1] + b"\xff"
        (folder / name).write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{name}' is damaged \(its digest is .*\); remove '.*', and it is made"):
            open_corpus(path, in_memory_bytes=0)
        (folder / name).write_bytes(whole)
        open_corpus(path, in_memory_bytes=0)
    (folder / "ids.npy").write_bytes(b"")
    (folder / "digests.json").unlink()  # as in a cache of an earlier release
    with pytest.raises(ValueError, match=r"ids.npy' has 0 bytes"):
        open_corpus(path, in_memory_bytes=0)
    shutil.rmtree(folder)
    assert list(open_corpus(path, in_memory_bytes=0)) == [Document("1", "", "a")]


def test_a_conversion_that_was_killed_at_any_moment_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "large.jsonl", {"id": 1, "contents": "a"})

    def open_in(folder: Path) -> Corpus:
        monkeypatch.setenv("CALIBADV_CACHE", str(folder))
        return open_corpus(path, in_memory_bytes=0)

    kills = 0
    for folder in kill_points(tmp_path, open_in):
        assert list(open_in(folder)) == [Document("1", "", "a")]
        capsys.readouterr()
        open_in(folder)
        assert capsys.readouterr().err == ""
        kills += 1
    assert kills > 20


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "large.jsonl", {"id": 1, "contents": "a"})
    monkeypatch.setenv("CALIBADV_CACHE", str(path))
    with pytest.raises(ValueError, match=r"large.jsonl' cannot be converted into .*; set CALIBADV_CACHE to another"):
        open_corpus(path, in_memory_bytes=0)


def test_a_missing_corpus(tmp_path: Path, opener: Opener) -> None:
    with pytest.raises(ValueError, match=r"corpus '.*nowhere.jsonl' does not exist; give a JSON-lines file"):
        opener(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"is a folder without manifest.json, and so not an index, and holds no"):
        opener(tmp_path)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = convert(source_of(DOCUMENTS), tmp_path / "out", shard_rows=8).folder
    shard = folder / "shard-00001.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=rf"shard-00001.arrow' has 100 bytes; it must have {len(whole)}: copy the fol"):
        ArrowCorpus(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"shard-00001.arrow' is missing; it must have {len(whole)} bytes: copy the"):
        ArrowCorpus(folder)
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(ValueError, match=r"shard-00001.arrow' is damaged \(Not an Arrow file\); copy the folder again"):
        ArrowCorpus(folder)[8]
    shard.write_bytes(whole)
    ids = (folder / "ids.npy").read_bytes()
    (folder / "ids.npy").write_bytes(b"\xff" * 9 + ids[9:])
    with pytest.raises(ValueError, match=r"ids.npy' is damaged \(it is no array of numpy\); copy the folder again"):
        ArrowCorpus(folder)
    (folder / "ids.npy").write_bytes(ids)
    layout = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps({**layout, "format": 9}))
    with pytest.raises(ValueError, match="has the corpus format 9, not 1; copy the folder again"):
        ArrowCorpus(folder)
    for key, value in {"documents": None, "shard_rows": 0, "batch_rows": "8", "files": []}.items():
        (folder / "corpus.json").write_text(json.dumps({**layout, key: value}))
        with pytest.raises(
            ValueError, match=rf"corpus.json' is damaged \(it has .* as '{key}'\); copy the folder again"
        ):
            ArrowCorpus(folder)
    (folder / "corpus.json").write_text(json.dumps({**layout, "documents": 22}))
    with pytest.raises(ValueError, match=r"ids.npy' is damaged \(it holds uint64 \[2, 23\]\); copy the folder again"):
        ArrowCorpus(folder)
    (folder / "corpus.json").write_text(json.dumps({**layout, "batch_rows": 4}))
    with pytest.raises(ValueError, match=r"shard-00001.arrow' is damaged \(it has other rows\); copy the folder again"):
        ArrowCorpus(folder)[8]


def test_numbers_of_an_open_corpus_are_rows(tmp_path: Path) -> None:
    source = open_source("embedded")
    assert [(number, document.id) for number, document in source.read(598)] == [
        (number, open_corpus("embedded")[number - 1].id) for number in (599, 600)
    ]
    assert convert(source, tmp_path / "out").checksum == open_corpus("embedded").checksum
