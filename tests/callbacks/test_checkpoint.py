"""What is kept when a run breaks, and that it goes on exactly from there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fits import SMALL, curves, files, fit, results

from calibadv.cli.main import main
from calibadv.runs.folder import RunFolder

# Four steps, a validation after every second one, and no checkpoint before the end.
FOUR = (
    *("--trainer.val_check_interval", "2", "--rollouts.every_n_rollout_steps", "1"),
    *("--checkpoint.every_n_rollout_steps", "100", "--model.rollout_steps", "4"),
)
KEYS = ("state_dict", "optimizer_states", "rollout_step", "seed", "validated_step")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rollout steps without interruption."""
    root = tmp_path_factory.mktemp("whole")
    assert fit(root, "whole", *FOUR) == 0
    return root / "whole"


def fault(step: int, place: str, error: str = "user") -> tuple[str, ...]:
    arguments = {"step": step, "place": place, "error": error}
    return ("--trainer.callbacks+", json.dumps({"class_path": "support.faults.Fault", "init_args": arguments}))


def flat(value: Any) -> Any:
    """A checkpoint's content, its tensors as lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, list | tuple) else value


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, curves, rollouts and results are equal."""
    left, right = (torch.load(RunFolder(run).last, weights_only=True) for run in (one, other))
    assert {key: flat(left[key]) for key in KEYS} == {key: flat(right[key]) for key in KEYS}
    assert curves(one) == curves(other)
    assert files(one / "rollouts") == files(other / "rollouts")
    assert results(one) == results(other)


@pytest.mark.parametrize("place", ["search", "score", "estimate", "logprobs", "backward"])
def test_an_error_before_the_first_optimizer_step_saves_the_step_before(
    place: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, "run", *FOUR, *fault(3, place)) == 2
    error = capsys.readouterr().err
    assert "rollout step 2, the last one that was finished, is saved; to go on:\n  calibadv fit" in error
    folder = RunFolder(tmp_path / "run")
    assert folder.step_checkpoints() == [folder.checkpoint(2)]
    assert fit(tmp_path, "run", *FOUR, "--ckpt_path", "last") == 0
    assert_same_run(whole, tmp_path / "run")


def test_an_error_in_the_first_step_keeps_the_validation_before_it(whole: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, "run", *FOUR, *fault(1, "search")) == 2
    assert fit(tmp_path, "run", *FOUR, "--ckpt_path", "auto") == 0
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("step", [1, 3])
def test_an_error_in_the_middle_of_the_updates_saves_nothing(
    step: int, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = ("--checkpoint.every_n_rollout_steps", "1")
    assert fit(tmp_path, "run", *FOUR, *(every if step == 3 else ()), *fault(step, "update")) == 2
    stands = "there is no checkpoint" if step == 1 else "rollout-step=000002.ckpt stands"
    said = f"since the update of rollout step {step} was under way; {stands}, and 0 rollout steps are lost"
    assert said in " ".join(capsys.readouterr().err.split())
    assert fit(tmp_path, "run", *FOUR, "--ckpt_path", "auto") == 0
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("place", ["curves", "rollouts"])
def test_a_step_that_could_not_be_written_out_is_not_saved(
    place: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = ("--checkpoint.every_n_rollout_steps", "2")
    assert fit(tmp_path, "run", *FOUR, *every, *fault(3, place, "disk")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "rollout step 3 was not written out; rollout-step=000002.ckpt stands, and 0 rollout steps are lost" in error
    shutil.rmtree(tmp_path / "run/rollouts/train-step-000003.jsonl", ignore_errors=True)
    assert fit(tmp_path, "run", *FOUR, "--ckpt_path", "last") == 0
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("place", ["callback", "validation"])
def test_an_error_behind_a_finished_step_saves_it(place: str, whole: Path, tmp_path: Path) -> None:
    step = 2  # a validation is due behind it
    assert fit(tmp_path, "run", *FOUR, *fault(step, place)) == 2
    folder = RunFolder(tmp_path / "run")
    assert folder.step_checkpoints() == [folder.checkpoint(2)]
    assert fit(tmp_path, "run", *FOUR, "--ckpt_path", "last") == 0
    assert_same_run(whole, tmp_path / "run")


def test_a_bug_leaves_its_trace_and_says_what_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as error:
        fit(tmp_path, "run", *FOUR, *fault(3, "estimate", "bug"))
    assert error.value.__notes__[0].startswith("rollout step 2, the last one that was finished, is saved; to go on:")


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = ("--checkpoint.every_n_rollout_steps", "1", "--checkpoint.keep", "1")
    assert fit(tmp_path, "run", *FOUR, *every, *fault(3, "weights")) == 2
    error = capsys.readouterr().err
    assert "the checkpoint of rollout step 3 is not written, since " in error
    assert "rollout-step=000002.ckpt stands, and 1 rollout step is lost; to go on:" in error
    folder = RunFolder(tmp_path / "run")
    assert folder.step_checkpoints() == [folder.checkpoint(2)]
    assert all(weight.isfinite().all() for weight in torch.load(folder.last, weights_only=True)["state_dict"].values())


@pytest.mark.parametrize("logger", ["true", "false"])  # the curves notice it first, or the rollouts
def test_a_folder_that_is_removed_during_the_run(
    logger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, "run", *FOUR, *fault(2, "folder"), "--trainer.logger", logger) == 2
    error = capsys.readouterr().err
    assert re.search(f"error: .*{tmp_path / 'run'}.* was (it )?removed or renamed", error)
    assert "nothing is saved, since rollout step 2 was not written out; there is no checkpoint" in error
    assert list(tmp_path.iterdir()) == [tmp_path / "run-removed"]


def test_out_of_memory_comes_with_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "run", *FOUR, *fault(2, "backward", "memory")) == 2
    error = capsys.readouterr().err
    assert "there is not enough memory (out of memory: tried to allocate 64 GiB); lower model.micro_batch" in error
    assert "rollout step 1, the last one that was finished, is saved" in error


def killed(root: Path, *words: str) -> int:
    """Run fit in a process of its own."""
    command = [sys.executable, "-m", "calibadv.cli.main", "fit", "--config", "quickstart", *SMALL, *FOUR]
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    done = subprocess.run(
        [*command, "--run.root", str(root), "--run.name", "run", *words], env=environment, capture_output=True
    )
    return done.returncode


def test_one_command_starts_goes_on_finishes_and_ends(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = ("--ckpt_path", "auto")
    assert killed(tmp_path, *auto, *fault(1, "search", "kill")) == -9  # before the first checkpoint: starts anew
    assert (tmp_path / "run/config.yaml").exists()
    assert killed(tmp_path, *auto, *fault(4, "validation", "kill")) == -9  # behind the last step: finishes
    assert fit(tmp_path, "run", *FOUR, *auto) == 0
    assert_same_run(whole, tmp_path / "run")
    before = files(tmp_path / "run")
    capsys.readouterr()
    assert fit(tmp_path, "run", *FOUR, *auto) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'} is finished at rollout step 4\n"
    assert files(tmp_path / "run") == before


def test_a_run_that_lacks_only_its_end_is_finished(whole: Path, tmp_path: Path) -> None:
    folder = RunFolder(Path(shutil.copytree(whole, tmp_path / "run")))
    recorded = folder.read_results()
    rows = recorded["validations"]
    folder.results.write_text(json.dumps({**recorded, "finished": False, "validations": rows[:-1]}))  # killed there
    folder.last.unlink()
    assert fit(tmp_path, "run", *FOUR, "--ckpt_path", "last") == 0
    assert_same_run(whole, tmp_path / "run")


def test_auto_needs_a_name_that_the_next_attempt_finds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "quickstart", "--ckpt_path", "auto"]) == 2
    assert "--ckpt_path auto: name the run with --run.name" in capsys.readouterr().err


def test_a_job_that_is_put_into_the_queue_again_finds_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    words = ["fit", "--config", "quickstart", *SMALL, "--model.rollout_steps", "1", "--run.root", str(tmp_path)]
    assert main([*words, "--ckpt_path", "auto"]) == 0
    capsys.readouterr()
    assert main([*words, "--ckpt_path", "auto"]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/quickstart-seed0-job77 is finished at rollout step 1"


def test_a_checkpoint_that_cannot_be_put_in_place_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_the_way = RunFolder(tmp_path / "run").checkpoint(1) / "mine.txt"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    words = ("--model.rollout_steps", "1", "--checkpoint.every_n_rollout_steps", "1")
    assert fit(tmp_path, "run", *words) == 2
    error = capsys.readouterr().err
    assert "the checkpoint of rollout step 1 cannot be written to" in error
    assert "Traceback" not in error
    assert [path.name for path in RunFolder(tmp_path / "run").checkpoints.iterdir()] == [in_the_way.parent.name]
