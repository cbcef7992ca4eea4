from __future__ import annotations

from pathlib import Path

import pytest

from calibadv.run_folder import RunFolder, write_atomically


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


def test_a_folder_is_claimed_once(folder: RunFolder) -> None:
    folder.claim("seed: 0")
    with pytest.raises(ValueError, match=r"run holds a run already; choose another --run.name"):
        folder.claim("seed: 1")
    assert folder.config(None).read_text() == "seed: 0"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    touch(tmp_path / "file")
    with pytest.raises(ValueError, match=r"run folder '.*' cannot be written to \(.*\); choose another --run.root"):
        RunFolder(tmp_path / "file" / "run").claim("")


def test_checkpoints_from_the_newest_down(folder: RunFolder) -> None:
    assert folder.checkpoints_newest_first() == []
    touch(folder.last)
    assert folder.checkpoints_newest_first() == [folder.last]
    touch(folder.checkpoint(20), folder.checkpoint(100))
    # A last.ckpt that is a copy, where there are no hard links, may be whole where the newest one is not.
    assert folder.checkpoints_newest_first() == [folder.checkpoint(100), folder.last, folder.checkpoint(20)]
    folder.point_last_at(folder.checkpoint(20))
    assert folder.checkpoints_newest_first() == [folder.checkpoint(100), folder.checkpoint(20)]


def test_last_follows_a_checkpoint(folder: RunFolder) -> None:
    touch(folder.checkpoint(1), folder.checkpoint(2))
    for step in (2, 1, 1):
        folder.point_last_at(folder.checkpoint(step))
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
    folder.drop_beyond(20)
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
