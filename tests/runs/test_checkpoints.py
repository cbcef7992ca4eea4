"""Damaged and wrong checkpoints: found before anything is resumed from them, or deleted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fits import files, fit, results
from support.kills import Killed

from calibadv.callbacks.results import Results
from calibadv.runs.checkpoints import damage
from calibadv.runs.folder import RunFolder

WORDS = ("--checkpoint.every_n_rollout_steps", "1", "--checkpoint.keep", "0", "--rollouts.every_n_rollout_steps", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rollout steps."""
    root = tmp_path_factory.mktemp("run")
    assert fit(root, "run", *WORDS, "--model.rollout_steps", "2") == 0
    return root / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> RunFolder:
    """The same, to be damaged; last.ckpt is the newest checkpoint, as it is in the original."""
    folder = RunFolder(Path(shutil.copytree(run, tmp_path / "run")))
    folder.last.unlink()
    folder.last.hardlink_to(folder.checkpoint(2))
    return folder


def change_bytes(path: Path, at: float, number: int) -> None:
    content = bytearray(path.read_bytes())
    start = int(len(content) * at)
    content[start : start + number] = bytes(byte ^ 0xFF for byte in content[start : start + number])
    path.write_bytes(content)


def die(*arguments: object) -> None:
    raise Killed


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return apply


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "2000 bytes": (lambda path: change_bytes(path, 0.5, 2000), "bytes of its record .*data/.* have changed"),
    "1 byte": (lambda path: change_bytes(path, 0.3, 1), "bytes of its record .* have changed"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "it is no whole file"),
    "empty": (lambda path: path.write_bytes(b""), "it is no whole file"),
    "another format": (lambda path: path.write_text("a pickle, perhaps"), "it is no whole file"),
    "no step": (edit(lambda c: c.pop("rollout_step")), "it has no 'rollout_step'"),
    "step is text": (edit(lambda c: c.update(rollout_step="two")), "it has 'two' as 'rollout_step'"),
    "step is nan": (edit(lambda c: c.update(rollout_step=float("nan"))), "it has nan as 'rollout_step'"),
    "step -7": (edit(lambda c: c.update(rollout_step=-7)), "it has -7 as 'rollout_step'"),
    "step 1": (edit(lambda c: c.update(rollout_step=1)), "it holds rollout step 1, which its name contradicts"),
    "no version": (edit(lambda c: c.pop("pytorch-lightning_version")), "it has no 'pytorch-lightning_version'"),
    "no loops": (edit(lambda c: c.pop("loops")), "it has no 'loops'"),
    "no callbacks": (edit(lambda c: c.pop("callbacks")), "it has no 'callbacks'"),
    "no results": (
        edit(lambda c: c["callbacks"]["Results"].pop("validations")),
        "in 'Results', it has no 'validations'",
    ),
    "no progress": (edit(lambda c: c.update(loops={})), "it has no 'fit_loop'"),
    "no counts": (
        edit(lambda c: c["loops"]["fit_loop"].update({"epoch_loop.batch_progress": {}})),
        "it has no 'total'",
    ),
    "no such version": (
        edit(lambda c: c.update({"pytorch-lightning_version": "banana"})),
        "it has 'banana' as 'pytorch-lightning_version'",
    ),
    "statuses": (edit(lambda c: c["callbacks"]["Results"]["statuses"].update(answered="many")), "it has 'many' as"),
    "a validation": (
        edit(lambda c: c["callbacks"]["Results"]["validations"][0].pop("step")),
        "in a validation, it has no 'step'",
    ),
    "skipped": (edit(lambda c: c.update(skipped_in_a_row="x")), "it has 'x' as 'skipped_in_a_row'"),
    "moments nan": (
        edit(lambda c: c["optimizer_states"][0]["state"][3]["exp_avg"].fill_(torch.nan)),
        "the state of its optimizer .*exp_avg.* of parameter 3.* is not finite",
    ),
    "no counters": (edit(lambda c: c["loops"].update(fit_loop=3)), "it has 3 as 'fit_loop'"),
    "no weights": (edit(lambda c: c.pop("state_dict")), "it has no 'state_dict'"),
    "weights nan": (edit(lambda c: next(iter(c["state_dict"].values())).view(-1)[3:4].fill_(torch.nan)), "not finite"),
    "a list": (lambda path: torch.save([1, 2], path), "it holds list, and not the parts of a checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(name: str, copy: RunFolder) -> None:
    change, reason = DAMAGES[name]
    assert damage(copy.checkpoint(2)) is None
    change(copy.checkpoint(2))
    assert re.search(reason, str(damage(copy.checkpoint(2))))


@pytest.mark.parametrize("name", ["2000 bytes", "step -7", "weights nan"])
def test_the_next_older_checkpoint_takes_the_place_of_a_damaged_one(
    name: str, copy: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    newest = copy.checkpoint(2)
    DAMAGES[name][0](newest)
    assert fit(copy.path.parent, "run", *WORDS, "--model.rollout_steps", "3", "--ckpt_path", "last") == 0
    (warning,) = [message for message in caplog.messages if message.startswith("damaged checkpoints")]
    assert f"{newest}: " in warning
    assert warning.endswith(f"{copy.checkpoint(1)} is used instead, 1 rollout step earlier")
    assert [row["step"] for row in results(copy.path)["validations"]] == [0, 3]
    assert copy.step_checkpoints() == [copy.checkpoint(step) for step in (1, 2, 3)]
    assert damage(newest) is None  # made again


@pytest.mark.parametrize("name", ["2000 bytes", "another format", "step -7"])
def test_a_damaged_checkpoint_that_is_named_is_refused_in_one_line(
    name: str, copy: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    change, reason = DAMAGES[name]
    newest = copy.checkpoint(2)
    change(newest)
    before = files(copy.path)
    assert fit(copy.path.parent, "run", *WORDS, "--model.rollout_steps", "3", "--ckpt_path", str(newest)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(reason, error)
    assert f"{copy.checkpoint(1)} is not damaged: give that" in error
    assert files(copy.path) == before


def test_where_all_are_damaged_nothing_is_started_anew(copy: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        change_bytes(copy.checkpoint(step), 0.5, 2000)
    before = files(copy.path)
    for word in ("last", "auto"):
        assert fit(copy.path.parent, "run", *WORDS, "--model.rollout_steps", "3", "--ckpt_path", word) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "every checkpoint of the run is damaged" in error
    assert files(copy.path) == before


def drop_moments(parameters: slice, content: dict[str, Any]) -> None:
    for state in list(content["optimizer_states"][0]["state"].values())[parameters]:
        del state["exp_avg"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda c: c["state_dict"].popitem(), r"the checkpoint has no model\..*, and the policy has model\..* of \["),
        (
            lambda c: c["state_dict"].update(more=torch.ones(2)),
            r"the checkpoint has more of \[2\], and the policy has no",
        ),
        (
            lambda c: c["state_dict"].update({k: v[:1] for k, v in list(c["state_dict"].items())[:1]}),
            r"the checkpoint has model\..* of \[1.*\], and the policy has model",
        ),
        (lambda c: c["optimizer_states"].clear(), r"the checkpoint's optimizer state does not fit the policy"),
        (
            lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg=torch.ones(3)),
            r"the checkpoint's optimizer state does not fit the policy \(parameter 0\)",
        ),
        *(
            (
                partial(drop_moments, parameters),
                r"the checkpoint's optimizer state does not fit the policy \(parameter ",
            )
            for parameters in (slice(1), slice(None))
        ),
        (lambda c: c["optimizer_states"][0].pop("param_groups"), r"optimizer state does not fit the policy"),
        (lambda c: c["optimizer_states"][0]["param_groups"][0]["params"].pop(), r"optimizer state does not fit the po"),
        (lambda c: c["optimizer_states"][0]["state"].pop(2), r"optimizer state does not fit the policy \(.* of "),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_anything_is_deleted(
    change: Callable[[dict[str, Any]], Any], line: str, copy: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(change)(copy.checkpoint(1))
    before = files(copy.path)
    older = str(copy.checkpoint(1))
    assert fit(copy.path.parent, "run", *WORDS, "--model.rollout_steps", "3", "--ckpt_path", older) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(line, error), error
    assert files(copy.path) == before


@pytest.mark.parametrize("content", ["", "[]", '{"events": [{"step": 1}]}'])
def test_a_damaged_record_of_the_guard_is_an_error_of_one_line(
    content: str, copy: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy.path / "guard.json").write_text(content)
    assert fit(copy.path.parent, "run", *WORDS, "--model.rollout_steps", "3", "--ckpt_path", "auto") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"'{copy.path / 'guard.json'}' is damaged" in error


def test_a_longer_run_that_is_killed_before_its_results_is_not_taken_for_finished(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = (*WORDS, "--model.rollout_steps", "3", "--ckpt_path", "auto")
    assert results(copy.path)["finished"] is True
    with monkeypatch.context() as patch:
        patch.setattr(Results, "on_validation_end", die)
        with pytest.raises(Killed):
            fit(copy.path.parent, "run", *longer)
    assert copy.checkpoint(3).exists()
    assert results(copy.path)["finished"] is False
    assert fit(copy.path.parent, "run", *longer) == 0
    assert [row["step"] for row in results(copy.path)["validations"]] == [0, 3]
    assert results(copy.path)["finished"] is True


@pytest.mark.parametrize(
    "left", ["results.json", "rollouts/test-step-000002.jsonl", "rollouts/train-step-000002.jsonl"]
)
def test_a_run_whose_checkpoints_were_removed_is_not_started_anew(
    left: str, copy: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the first checkpoint's interval can have been left by an attempt without one."""
    shutil.rmtree(copy.checkpoints)
    if left != "results.json":
        copy.results.unlink()
        shutil.rmtree(copy.rollouts)
        (copy.path / left).parent.mkdir()
        (copy.path / left).touch()
    before = files(copy.path)
    assert fit(copy.path.parent, "run", *WORDS, "--model.rollout_steps", "3", "--ckpt_path", "auto") == 2
    error = capsys.readouterr().err
    assert Path(left).name in error
    assert "which a new start would remove" in error
    assert files(copy.path) == before
