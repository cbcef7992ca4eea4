from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.kills import tree

from calibadv.io.files import replace_durably, save_array, write_atomically
from calibadv.retrieval.corpus.convert import Source, convert
from calibadv.runs.folder import RunFolder
from calibadv.runs.rollouts import write_records
from calibadv.types import Document


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)


def test_names(folder: RunFolder) -> None:
    names = {
        "config.yaml": folder.config(None),
        "config-resume-000000.yaml": folder.config(0),
        "config-resume-000060.yaml": folder.config(60),
        "results.json": folder.results,
        "checkpoints/rollout-step=000060.ckpt": folder.checkpoint(60),
        "checkpoints/last.ckpt": folder.last,
        "rollouts/val-step-000010.jsonl": folder.rollout_file("val", 10),
    }
    assert {name: folder.path / name for name in names} == names


def test_a_folder_holds_a_run_from_its_first_file_on(folder: RunFolder) -> None:
    assert not folder.holds_run
    touch(folder.config(None))
    assert folder.holds_run


def test_a_folder_is_created_once(folder: RunFolder) -> None:
    folder.create("seed: 0")
    with pytest.raises(ValueError, match=r"run holds a run already; choose another --run.name"):
        folder.create("seed: 1")
    assert folder.config(None).read_text() == "seed: 0"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    touch(tmp_path / "file")
    with pytest.raises(ValueError, match=r"run folder '.*' cannot be written to \(.*\); choose another --run.root"):
        RunFolder(tmp_path / "file" / "run").create("")


def test_checkpoints_from_the_newest_down(folder: RunFolder) -> None:
    assert folder.checkpoints_newest_first() == []
    touch(folder.last)
    assert folder.checkpoints_newest_first() == [folder.last]
    touch(folder.checkpoint(20), folder.checkpoint(100))
    # A last.ckpt that is a copy, where there are no hard links, may be whole where the newest one is not.
    assert folder.checkpoints_newest_first() == [folder.checkpoint(100), folder.last, folder.checkpoint(20)]
    folder.link_last(folder.checkpoint(20))
    assert folder.checkpoints_newest_first() == [folder.checkpoint(100), folder.checkpoint(20)]


def test_last_follows_a_checkpoint(folder: RunFolder) -> None:
    touch(folder.checkpoint(1), folder.checkpoint(2))
    for step in (2, 1, 1):
        folder.link_last(folder.checkpoint(step))
        assert folder.last.read_text() == folder.checkpoint(step).name
    assert folder.checkpoint(2).exists()


def test_what_lies_beyond_a_checkpoint_is_dropped(folder: RunFolder) -> None:
    kept = [
        *(folder.rollout_file(split, 20) for split in ("train", "val")),
        *(folder.rollout_file(split, 30) for split in ("test", "predict")),
        folder.checkpoint(20),
        folder.config(None),
        folder.results,
    ]
    dropped = [
        *(folder.rollout_file(split, 21) for split in ("train", "val")),
        folder.checkpoint(1000000),
        folder.checkpoint(20).with_suffix(".partial"),
        folder.rollouts / ".train-step-000020.jsonl.77.partial",
        folder.path / "results.json.partial",
    ]
    touch(*kept, *dropped)
    folder.truncate_after(20)
    assert sorted(path for path in folder.path.rglob("*") if path.is_file()) == sorted(kept)


def test_results_are_empty_before_the_first(folder: RunFolder) -> None:
    assert folder.read_results() == {}
    write_atomically(folder.results, '{"seed": 3}')
    assert folder.read_results() == {"seed": 3}


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, "long text")
    write_atomically(path, "é")
    assert path.read_text(encoding="utf-8") == "é"
    assert list(path.parent.iterdir()) == [path]


def convert_one(path: Path) -> None:
    convert(Source("test", {}, lambda after: ((n, Document("a", "", "")) for n in (1,) if n > after)), path.parent)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_atomically(path, "text"),
    "rollouts": lambda path: write_records(path, [{"a": 1}]),
    "array": lambda path: save_array(path, np.ones(3)),
    "corpus": convert_one,
    "config": lambda path: RunFolder(path.parent).create("seed: 0"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_a_power_cut_leaves_is_complete(
    write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, int]] = []
    names: dict[int, set[str]] = {}

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size))
        if status.st_ino == tmp_path.stat().st_ino:
            names[status.st_ino] = {path.name for path in tmp_path.iterdir()}

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "file")
    assert tree(tmp_path)
    for path in tmp_path.iterdir():
        assert (path.stat().st_ino, path.stat().st_size) in synced
    # The names of all were there when the folder was written for the last time.
    assert names[tmp_path.stat().st_ino] >= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_leaves_no_half_of_a_file(
    write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("as it was")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises((OSError, ValueError), match="No space left"):
            write(tmp_path / "file")
    # A conversion begins by removing what is in its folder.
    assert tree(tmp_path) == ({} if write is convert_one else {"file": b"as it was"})
    write(tmp_path / "file")


def test_a_folder_is_moved_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "partial" / "a", tmp_path / "partial" / "below" / "b")
    (tmp_path / "partial" / "link").symlink_to("nowhere")
    inodes = {path.stat().st_ino for path in (tmp_path / "partial").rglob("*") if not path.is_symlink()}
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    replace_durably(tmp_path / "partial", tmp_path / "whole")
    assert tree(tmp_path) == {"whole/a": b"a", "whole/below/b": b"b"}
    assert synced == {*inodes, (tmp_path / "whole").stat().st_ino, tmp_path.stat().st_ino}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_be_told_to_write_is_used_as_it_is(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, "cannot")

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "file", "text")
    assert tree(tmp_path) == {"file": b"text"}


def test_a_disk_without_room_for_a_copy_leaves_last_as_it_was(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(folder.checkpoint(20), folder.checkpoint(40))
    folder.link_last(folder.checkpoint(20))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)  # a file system without hard links
    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(OSError, match="No space left"):
        folder.link_last(folder.checkpoint(40))
    assert folder.last.samefile(folder.checkpoint(20))
    assert not list(folder.checkpoints.glob("*.partial"))
