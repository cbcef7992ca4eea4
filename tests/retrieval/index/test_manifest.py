"""Opening and verifying an index folder: damage, copies, and the record of verified files."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from support.kills import tree

from calibadv.retrieval.bm25 import BM25
from calibadv.retrieval.corpus.integrity import check_digests
from calibadv.retrieval.index.build import index
from calibadv.retrieval.index.manifest import open_index, read_manifest, verify_index, write_manifest
from calibadv.retrieval.index.open import open_corpus


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
