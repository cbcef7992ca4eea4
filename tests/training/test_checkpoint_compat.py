from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fits import SMALL, curves, files, fit, results

from calibadv.cli.main import main
from calibadv.runs.folder import RunFolder

# A validation after every second step, a checkpoint and a rollout file after each.
EVERY = (
    *("--trainer.val_check_interval", "2", "--rollouts.every_n_rollout_steps", "1"),
    *("--checkpoint.every_n_rollout_steps", "1", "--checkpoint.keep", "0"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """Six rollout steps without interruption."""
    assert fit(root, "whole", *EVERY, "--model.rollout_steps", "6") == 0
    return root / "whole"


@pytest.fixture(scope="module")
def parts(root: Path) -> Path:
    """Three rollout steps, and three more."""
    assert fit(root, "parts", *EVERY, "--model.rollout_steps", "3") == 0
    assert fit(root, "parts", *EVERY, "--model.rollout_steps", "6", "--ckpt_path", "last") == 0
    return root / "parts"


@pytest.fixture
def copy(parts: Path, tmp_path: Path) -> Path:
    """A copy of the run in parts, to be changed."""
    return Path(shutil.copytree(parts, tmp_path / "copy"))


def load(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    return content


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, down to the tensors."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def test_model_and_optimizer_are_those_of_an_uninterrupted_run(whole: Path, parts: Path) -> None:
    for step in (4, 6):
        left, right = (load(RunFolder(run).checkpoint(step)) for run in (whole, parts))
        assert left["optimizer_states"][0]["state"]  # momentum is compared, not its absence
        for key in ("state_dict", "optimizer_states", "rollout_step", "seed", "validated_step"):
            assert_same(left[key], right[key])


def test_the_weights_do_change(parts: Path) -> None:
    weights = [load(RunFolder(parts).checkpoint(step))["state_dict"] for step in (3, 6)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_curves_rollouts_and_results_are_those_of_an_uninterrupted_run(whole: Path, parts: Path) -> None:
    left, right = curves(whole), curves(parts)
    assert left.keys() == right.keys()
    for tag in left:
        assert {step: left[tag][step] for step in left[tag] if step > 3} == {
            step: right[tag][step] for step in right[tag] if step > 3
        }, tag
    rollouts = [run / "rollouts" for run in (whole, parts)]
    extra = {"val-step-000003.jsonl"}  # the first part validated where it ended
    assert {name: text for name, text in files(rollouts[1]).items() if name not in extra} == files(rollouts[0])
    assert results(parts) == results(whole)


def test_validations_keep_their_steps(parts: Path) -> None:
    assert [row["step"] for row in results(parts)["validations"]] == [0, 2, 4, 6]
    assert list(curves(parts)["val/f1"]) == [0, 2, 3, 4, 6]
    assert list(curves(parts)["reward/score"]) == [1, 2, 3, 4, 5, 6]


def test_the_resumed_run_stays_in_its_folder(parts: Path) -> None:
    saved, resumed = ((parts / name).read_text().splitlines() for name in ("config.yaml", "config-resume-000003.yaml"))
    assert [line.strip() for line in resumed if line not in saved] == ["rollout_steps: 6"]
    assert RunFolder(parts).last.samefile(RunFolder(parts).checkpoint(6))


def test_resume_from_an_older_checkpoint_drops_what_lies_beyond(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(copy)
    left_over = (copy / "results.json.partial", folder.checkpoints / "rollout-step=000007.partial")
    for path in left_over:
        path.write_text("killed")
    older = folder.checkpoint(2)
    assert (
        main(["fit", "--config", str(copy / "config.yaml"), "--model.rollout_steps", "4", "--ckpt_path", str(older)])
        == 0
    )
    steps = [path.name for path in folder.step_checkpoints()]
    assert steps == [f"rollout-step=00000{step}.ckpt" for step in (1, 2, 3, 4)]
    assert load(folder.last)["rollout_step"] == 4
    assert sorted(path.name for path in folder.rollouts.glob("train-*")) == [
        f"train-step-00000{step}.jsonl" for step in (1, 2, 3, 4)
    ]
    assert list(curves(copy)["reward/score"]) == [1, 2, 3, 4]
    assert list(curves(copy)["val/f1"]) == [0, 2, 4]
    assert [row["step"] for row in results(copy)["validations"]] == [0, 2, 4]
    assert not any(path.exists() for path in left_over)


def test_last_is_the_highest_step_even_if_a_kill_came_before_it_was_renewed(copy: Path) -> None:
    folder = RunFolder(copy)
    folder.link_last(folder.checkpoint(2))
    (folder.checkpoints / "rollout-step=000009.partial").write_text("killed while it was written")
    assert folder.checkpoints_newest_first()[0] == folder.checkpoint(6)


def test_a_finished_run_says_that_nothing_is_left(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(copy)
    assert fit(copy.parent, "copy", *EVERY, "--model.rollout_steps", "6", "--ckpt_path", "last") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nothing is left to do: the checkpoint holds 6 rollout steps and model.rollout_steps is 6" in error
    assert files(copy) == before


def test_another_seed_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(copy)
    more = ("--model.rollout_steps", "8", "--seed_everything", "1", "--ckpt_path", "last")
    assert fit(copy.parent, "copy", *EVERY, *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--seed_everything is 1 and the checkpoint's run has 0" in error
    assert files(copy) == before


def test_other_settings_are_named(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warnings_of(*more: str) -> list[str]:
        caplog.clear()
        assert fit(copy.parent, copy.name, *EVERY, *more, "--ckpt_path", "last") == 0
        return [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]

    assert warnings_of("--model.rollout_steps", "7") == []
    changed = ("--config", "calibrators/soft_penalty", "--model.clip_norm", "0.5")
    assert warnings_of("--model.rollout_steps", "8", *changed) == [
        "this run goes on with other settings than before: trainer.callbacks [] (now "
        "[AdvantageCalibration(calibrators=[SoftPenalty])]), model.clip_norm 1.0 (now 0.5)"
    ]


def test_another_protocol_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(copy)
    more = ("--model.rollout_steps", "8", "--config", "protocols/no_prepend", "--ckpt_path", "last")
    assert fit(copy.parent, "copy", *EVERY, *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "another protocol: model.protocol.prepend_think True (now False)" in error
    assert files(copy) == before


def test_an_evaluation_under_another_protocol_says_so(parts: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = [
        "--config",
        "quickstart",
        *SMALL,
        "--run.root",
        str(parts.parent),
        "--ckpt_path",
        str(RunFolder(parts).last),
    ]
    assert main(["validate", *options, "--run.name", "same"]) == 0
    assert not caplog.messages
    assert main(["validate", *options, "--run.name", "more", "--model.protocol.max_searches", "4"]) == 0
    assert "model.protocol.max_searches 3 (now 4)" in caplog.messages[0]


def test_a_checkpoint_under_another_name_starts_a_new_run(parts: Path, root: Path) -> None:
    before = files(parts)
    checkpoint = RunFolder(parts).checkpoint(6)
    assert fit(root, "branch", *EVERY, "--model.rollout_steps", "7", "--ckpt_path", checkpoint) == 0
    assert files(parts) == before
    assert (root / "branch" / "config-resume-000006.yaml").exists()
    assert load(RunFolder(root / "branch").last)["rollout_step"] == 7


@pytest.mark.parametrize("step", [3, 4])
def test_a_signal_ends_the_step_and_the_printed_command_goes_on(
    step: int, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 4 has a validation due, which is made up for."""
    interrupt = ("--trainer.callbacks+=support.fits.Interrupt", f"--trainer.callbacks.step={step}")
    assert fit(tmp_path, "run", *EVERY, "--model.rollout_steps", "6", *interrupt) == 143
    output = capsys.readouterr()
    assert f"SIGTERM: finishing rollout step {step}" in output.err
    assert f"stopped by SIGTERM after rollout step {step}" in output.out
    assert load(RunFolder(tmp_path / "run").last)["rollout_step"] == step
    program, *words = shlex.split(output.out.splitlines()[-1])
    assert program == "calibadv"
    assert main(words) == 0
    assert results(tmp_path / "run") == results(whole)
    assert curves(tmp_path / "run") == curves(whole)
    assert_same(load(RunFolder(tmp_path / "run").last)["state_dict"], load(RunFolder(whole).last)["state_dict"])


def test_without_validation_checkpoints_are_written_when_they_are_due(tmp_path: Path) -> None:
    words = ("--data.validation", "null", "--model.rollout_steps", "3")
    assert fit(tmp_path, "run", *EVERY, *words) == 0
    steps = [path.name for path in RunFolder(tmp_path / "run").step_checkpoints()]
    assert steps == [f"rollout-step=00000{step}.ckpt" for step in (1, 2, 3)]


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    words = ("--trainer.callbacks+=support.fits.Interrupt", "--trainer.callbacks.step=2", "--trainer.callbacks.times=2")
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, "run", *EVERY, "--model.rollout_steps", "6", *words)
    assert stop.value.code == 143
    assert load(RunFolder(tmp_path / "run").last)["rollout_step"] == 1
