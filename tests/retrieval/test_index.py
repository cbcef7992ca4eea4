"""The command that builds an index: what it writes, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray
from support.kills import kill_points, tree

from calibadv.retrieval.bm25 import BM25
from calibadv.retrieval.corpus.integrity import check_digests
from calibadv.retrieval.corpus.size import check_disk, free_disk, sample_file
from calibadv.retrieval.dense import Dense
from calibadv.retrieval.index.build import index
from calibadv.retrieval.index.builders import BM25Builder, encode_shards
from calibadv.retrieval.index.cost import index_size
from calibadv.retrieval.index.faiss import build_faiss, make_index, save_faiss
from calibadv.retrieval.index.manifest import open_index, read_manifest, verify_index, write_manifest
from calibadv.retrieval.index.open import open_corpus, sample_corpus
from calibadv.types import Document

RECORDS = [
    {"id": 1, "title": "Prague", "text": "The city lies on a river."},
    {"id": "two", "title": "Otter", "text": "An animal that swims and eats fish."},
    {"id": 3, "contents": '"Opera"\nA play in which everything is sung.'},
]


def write_lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def written(folder: Path) -> dict[str, bytes]:
    """All files of an index but the one that has their inodes and times."""
    return {name: content for name, content in tree(folder).items() if name != "verified.json"}


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_lines(tmp_path / "corpus.jsonl", *RECORDS)


@pytest.fixture
def built(tmp_path: Path, corpus: str) -> Path:
    index(corpus, tmp_path / "built", "bm25")
    return tmp_path / "built"


def test_an_index_of_words(tmp_path: Path, corpus: str, built: Path) -> None:
    manifest = read_manifest(built)
    assert (manifest.backend, manifest.documents) == ("bm25", 3)
    assert manifest.settings == {"stopwords": "english", "stemmer": None}
    assert manifest.corpus_checksum == open_corpus(corpus).checksum
    assert sorted(path.name for path in built.iterdir()) == ["bm25", "corpus", "manifest.json", "verified.json"]
    assert manifest.files == {name: len(content) for name, content in written(built).items() if name != "manifest.json"}
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
    assert written(tmp_path / "again") == written(built)


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
            assert written(out) == written(built)
            continue
        index(corpus, out, "bm25")
        assert written(out) == written(built)
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
        assert written(out) == written(tmp_path / "whole")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", r"corpus '.*' is empty; it must hold"),
        (b'{"id": 1, "contents": "ab"}\n{"id": 2}\n', r"corpus.jsonl:2 has only the keys id; a document needs"),
        (b'{"id": 1, "contents": "ab"}\n{"id": 1, "contents": "ab"}\n', r"jsonl:2 repeats the id '1' of line 1"),
        (b"{", r"corpus.jsonl:1 is not a JSON object"),
        (gzip.compress(b'{"id": 1, "contents": "ab"}\n' * 9)[:-12], r"corpus '.*' is a damaged gzip file"),
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


def damage_manifest(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, **values}))


def damage_digest(folder: Path, digest: Any) -> None:
    digests = json.loads((folder / "manifest.json").read_text())["digests"]
    damage_manifest(folder, digests={**digests, "corpus/corpus.json": digest})


def drop_digests(folder: Path) -> None:
    """Make the manifest one of a release that had no digests."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["digests"]
    (folder / "manifest.json").write_text(json.dumps(content))


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:5])


def replace_layout(folder: Path, content: Any) -> None:
    text = json.dumps(content)
    (folder / "corpus" / "corpus.json").write_text(text)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    damage_manifest(folder, files={**files, "corpus/corpus.json": len(text)})
    drop_digests(folder)


def overwrite(path: Path, place: int) -> None:
    """Damage a byte, so that the size stays as it was."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))


def overwrite_ids(folder: Path) -> None:
    drop_digests(folder)
    overwrite(folder / "corpus" / "ids.npy", 0)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (
        lambda folder: (folder / "manifest.json").unlink(),
        r"is a folder without manifest.json, and so not",
    ),
    "unfinished": (
        lambda folder: (folder / "manifest.json").rename(folder / "unfinished.json"),
        r"index '.*built' is unfinished; run the same 'calibadv index' command again to go on",
    ),
    "manifest cut off": (
        cut("manifest.json"),
        r"manifest.json' is missing or damaged \(.*\); copy the folder again, or",
    ),
    "manifest is a list": (
        lambda folder: (folder / "manifest.json").write_text("[]"),
        r"manifest.json' is damaged \(it is no JSON object\); copy",
    ),
    "another release": (lambda folder: damage_manifest(folder, format=2), r"is not a manifest of format 1, which this"),
    "another key": (
        lambda folder: damage_manifest(folder, colour=2),
        r"manifest.json' is damaged \(.*colour.*\); copy",
    ),
    "another backend": (
        lambda folder: damage_manifest(folder, backend="x"),
        r"manifest.json' has the backend 'x'; copy",
    ),
    "shard missing": (
        lambda folder: (folder / "corpus" / "shard-00000.arrow").unlink(),
        r"shard-00000.arrow' is missing; it must have \d+ bytes: copy the folder again, or build",
    ),
    "index cut off": (
        cut("bm25/vocab.index.json"),
        r"vocab.index.json' has 5 bytes; it must have \d+: copy the folder",
    ),
    "corpus layout cut off": (
        cut("corpus/corpus.json"),
        r"corpus.json' has 5 bytes; it must have \d+: copy the folder",
    ),
    "settings of none": (
        lambda folder: damage_manifest(folder, settings={}),
        r"manifest.json' is damaged \(it has no 'stopwords'\); copy",
    ),
    "settings of another backend": (
        lambda folder: damage_manifest(folder, backend="faiss"),
        r"manifest.json' is damaged \(it has no 'encoder'\); copy",
    ),
    "settings of another type": (
        lambda folder: damage_manifest(folder, settings=[]),
        r"manifest.json' is damaged \(it has \[\] as 'settings'\); copy",
    ),
    "no file named": (
        lambda folder: damage_manifest(folder, files={}),
        r"manifest.json' is damaged \(its files lack corpus/corpus.json\); copy",
    ),
    "digests of other files": (
        lambda folder: damage_manifest(folder, digests={}),
        r"manifest.json' is damaged \(its digests are not those of its files\); copy",
    ),
    "digests of another type": (
        lambda folder: damage_manifest(folder, digests=[]),
        r"manifest.json' is damaged \(it has \[\] as 'digests'\); copy",
    ),
    "digest of another type": (
        lambda folder: damage_digest(folder, 7),
        r"corpus.json' is damaged \(its digest is \w{32}, and that of what was written 7\); copy",
    ),
    "files of another type": (
        lambda folder: damage_manifest(folder, files=[]),
        r"manifest.json' is damaged \(it has \[\] as 'files'\); copy",
    ),
    "corpus layout without keys": (
        lambda folder: replace_layout(folder, {"format": 1}),
        r"corpus.json' is damaged \(it has no 'documents'\); copy",
    ),
    "corpus layout is a list": (
        lambda folder: replace_layout(folder, []),
        r"corpus.json' is damaged \(it is no JSON object\); copy",
    ),
    "ids overwritten": (
        overwrite_ids,
        r"ids.npy' is damaged \(it is no array of numpy\); copy",
    ),
    "corpus of others": (
        lambda folder: damage_manifest(folder, corpus_checksum="ab"),
        r"the corpus in '.*built' has 3 documents with checksum \w{32}, and the index was built of 3 with ab; copy",
    ),
    "corpus of another size": (
        lambda folder: damage_manifest(folder, documents=4),
        r"has 3 documents with checksum \w{32}, and the index was built of 4 with \w{32}; copy",
    ),
}


@pytest.mark.parametrize(("damage", "line"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_index_is_refused(built: Path, damage: Callable[[Path], Any], line: str) -> None:
    damage(built)
    for opening in (open_index, open_corpus, lambda folder: BM25(index=str(folder))):
        with pytest.raises(ValueError, match=line) as caught:
            opening(built)
        assert "\n" not in str(caught.value)


def test_an_overwritten_shard_is_named_when_it_is_read(built: Path) -> None:
    shard = built / "corpus" / "shard-00000.arrow"
    drop_digests(built)
    overwrite(shard, shard.stat().st_size - 1)
    retriever = BM25(index=str(built))
    with pytest.raises(ValueError, match=r"shard-00000.arrow' is damaged \(Not an Arrow file\); copy the folder again"):
        retriever.search(["fish"], 1)


# --- digests

SHARD = "corpus/shard-00000.arrow"


def overwrite_unseen(path: Path, place: int) -> None:
    """Damage a byte, and leave size, inode and time of modification as they were."""
    status = path.stat()
    overwrite(path, place)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def damaged(name: str) -> str:
    return rf"{name}' is damaged \(its digest is \w{{32}}, and that of what was written \w{{32}}\); copy the folder"


@pytest.mark.parametrize("backend", ["bm25", "faiss"])
def test_a_changed_byte_of_any_file_is_found(tmp_path: Path, corpus: str, backend: Literal["bm25", "faiss"]) -> None:
    built = tmp_path / "built"
    index(corpus, built, backend)
    files = read_manifest(built).files
    assert len(files) == {"bm25": 8, "faiss": 4}[backend]
    for name in files:
        path = built / name
        place = path.stat().st_size // 2
        overwrite_unseen(path, place)
        with pytest.raises(ValueError, match=damaged(name)):
            verify_index(built)
        for _ in range(2):  # and nothing vouches for it any more
            with pytest.raises(ValueError, match=damaged(name)):
                open_index(built)
        overwrite_unseen(path, place)  # the second time makes it whole again
        open_index(built)
        overwrite(path, place)  # which its time of modification tells
        with pytest.raises(ValueError, match=damaged(name)) as caught:
            open_index(built)
        assert "\n" not in str(caught.value)
        overwrite(path, place)
    assert verify_index(built).files == files


def test_what_did_not_change_is_not_read_again(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    open_index(built)
    overwrite_unseen(built / SHARD, 500)
    (built / "corpus" / "ids.npy").touch()  # of the files, only this one is read
    open_index(built)
    assert re.fullmatch(
        r"reading 176 bytes of '.*built' once, to verify files that were copied .*\n", capsys.readouterr().err
    )
    built.rename(built.parent / "moved")
    open_index(built.parent / "moved")
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=damaged(SHARD)):
        verify_index(built.parent / "moved")


def test_a_copy_is_read_once(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = built.parent / "copy"
    shutil.copytree(built, copy)
    capsys.readouterr()
    assert list(open_index(copy)[1]) == list(open_index(built)[1])
    told = capsys.readouterr().err
    assert re.fullmatch(r"reading [\d,.]+ (bytes|kB) of '.*copy' once, to verify files that were copied .*\n", told)
    overwrite_unseen(copy / SHARD, 500)
    open_index(copy)
    assert capsys.readouterr().err == ""
    again = built.parent / "again"
    shutil.copytree(copy, again)
    with pytest.raises(ValueError, match=f"again/{damaged(SHARD)}"):
        open_index(again)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: None,
        lambda content: [content],
        lambda content: {},
        lambda content: {**content, "record": "0" * 32},
        lambda content: {**content, "stamps": []},
        lambda content: {**content, "stamps": dict.fromkeys(content["stamps"], 1)},
    ],
)
def test_a_record_of_another_manifest_or_a_damaged_one_vouches_for_nothing(
    built: Path, change: Callable[[Any], Any]
) -> None:
    record = built / "verified.json"
    whole = json.loads(record.read_text())
    overwrite_unseen(built / SHARD, 500)
    record.write_text(json.dumps(change(whole)))
    with pytest.raises(ValueError, match=damaged(SHARD)):
        open_index(built)
    overwrite_unseen(built / SHARD, 500)
    open_index(built)
    assert json.loads(record.read_text()) == whole
    record.write_bytes(b"\xff{")
    open_index(built)
    assert json.loads(record.read_text()) == whole


def test_what_was_read_of_a_folder_that_cannot_be_written_is_kept_in_the_cache(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = built.parent / "cache"
    monkeypatch.setenv("CALIBADV_CACHE", str(cache))
    (built / "verified.json").unlink()
    (built / "verified.json").mkdir()  # root may write to any folder, but not over another
    capsys.readouterr()
    for told in (1, 0):
        open_index(built)
        assert capsys.readouterr().err.count("reading") == told
    [kept] = [path for path in cache.rglob("*") if path.is_file()]
    assert kept.parent.name == "verified"
    overwrite_unseen(built / SHARD, 500)
    open_index(built)
    with pytest.raises(ValueError, match=damaged(SHARD)):
        verify_index(built)
    assert not kept.exists()
    overwrite_unseen(built / SHARD, 500)
    verify_index(built)
    assert kept.exists()
    # It belongs to this path alone.
    built.rename(built.parent / "moved")
    open_index(built.parent / "moved")
    assert "reading" in capsys.readouterr().err
    assert [path.name for path in built.parent.glob("moved/*verified*")] == ["verified.json"]


def test_where_nothing_can_be_kept_an_index_opens_and_says_so(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (built / "verified.json").unlink()
    (built / "verified.json").mkdir()
    monkeypatch.setenv("CALIBADV_CACHE", str(built / "manifest.json"))
    capsys.readouterr()
    for _ in range(2):
        open_index(built)
        first, second = capsys.readouterr().err.splitlines()
        assert first.startswith("reading")
        assert re.match(
            r"'.*' cannot be written, and so .* be read again at the next start; set CALIBADV_CACHE", second
        )


def test_several_may_open_a_copy_at_once(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    (copy / "verified.json").unlink()
    names = set(tree(built))
    with ThreadPoolExecutor(8) as pool:
        assert {len(opened[1]) for opened in pool.map(open_index, [copy] * 40)} == {3}
    assert set(tree(copy)) == names


def test_an_index_of_a_release_without_digests_opens_and_cannot_be_verified(built: Path) -> None:
    drop_digests(built)
    (built / "verified.json").unlink()
    assert len(open_index(built)[1]) == 3
    assert BM25(index=str(built)).search(["fish"], 1)[0][0].document.id == "two"
    with pytest.raises(ValueError, match=r"built' has no digests .*; build it anew with 'calibadv index', which makes"):
        verify_index(built)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read even by root")
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to("/proc/self/mem")
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(ValueError, match=r"file' cannot be read \(Input/output error\); copy it"):
        check_digests(tmp_path / "record.json", {"file": "0" * 32}, "copy it")


@pytest.mark.parametrize("content", ["", "[1]"])
def test_a_damaged_plan_is_named(tmp_path: Path, corpus: str, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unfinished.json").write_text(content)
    with pytest.raises(ValueError, match=r"unfinished.json' is .*damaged .*; remove the folder"):
        index(corpus, tmp_path / "out", "bm25")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, every write beyond fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("capsys")  # without it the estimate goes to a file of pytest's, and is what fails
def test_a_full_disk_is_said_and_gone_on_with(tmp_path: Path, corpus: str) -> None:
    index(corpus, tmp_path / "words", "bm25")
    index(corpus, tmp_path / "meanings", "faiss")
    backends: tuple[Literal["bm25", "faiss"], ...] = ("bm25", "faiss")
    for backend, whole in zip(backends, (tmp_path / "words", tmp_path / "meanings"), strict=True):
        sizes = {len(content) for content in written(whole).values()}
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
            assert written(out) == written(whole)


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


def test_an_index_of_faiss_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    flat = build_faiss([np.ones((20, 8), np.float32)], 20, 8, "Flat")
    save_faiss(flat, tmp_path / "whole")
    # The last bytes, which are in a buffer until the file is closed.
    with files_of_at_most((tmp_path / "whole").stat().st_size - 1), pytest.raises(OSError, match="File too large"):
        save_faiss(flat, tmp_path / "cut")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read even by root")
@pytest.mark.parametrize("opener", [open_corpus, sample_corpus])
def test_a_corpus_that_cannot_be_read_is_not_blamed_on_the_folder(opener: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=r"corpus '/proc/self/mem' cannot be read \(Input/output error\); see to the"):
        opener("/proc/self/mem")


def test_an_index_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"index '.*nowhere' is not a folder; give a folder that 'calibadv index' wrote"
    ):
        read_manifest(tmp_path / "nowhere")


def test_a_manifest_is_read_as_it_was_written(built: Path) -> None:
    settings = {"stopwords": ["a", "é"], "stemmer": None}
    written = write_manifest(built, "bm25", open_corpus(built), settings)
    assert read_manifest(built) == written
    assert written.settings == settings


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
    path.write_bytes(gzip.compress(lines.encode(), 1) if packed else lines.encode())
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
