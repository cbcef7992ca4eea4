from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.fits import SMALL, curves

from calibadv.analysis.compare.command import compare
from calibadv.cli.main import main as calibadv
from calibadv.config.logging import quiet_environment
from calibadv.runs.versions import versions
from calibadv.study import study
from calibadv.study.command import plan_study, read_study
from calibadv.study.fingerprints import source_fingerprints
from calibadv.study.manifest import StudyManifest
from calibadv.study.runner import StudyState
from calibadv.study.runs import StudyRun, study_runs
from calibadv.study.table import arm_table

FIT = ("--config", "quickstart", *SMALL, "--model.rollout_steps", "2")
WORDS = (*FIT, "--seeds", "0", "--arm", "grpo")
CALIBADV = ("--arm", "calibadv=calibrators/calibadv")
quiet_environment()


def words(*more: str | Path, out: Path) -> list[str]:
    return [*WORDS, "--out", str(out), *map(str, more)]


def refusal(function: Callable[[], object]) -> str:
    """The one line that a mistake ends in."""
    with pytest.raises(ValueError) as error:  # noqa: PT011  # callers look at the message
        function()
    message = str(error.value)
    assert "\n" not in message
    return message


# --- what is refused before anything is run


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arm", "no name=calibrators/calibadv"], "arm 'no name': a name has letters, digits"),
        (["--arm", "../up"], "arm '../up': a name has letters, digits"),
        (["--arm", "GRPO=calibrators/soft_penalty"], "duplicate arm 'GRPO'; arm names must be unique"),
        (["--arm", "report"], "arm 'report': the folder of this name is for the report"),
        (["--arm", "again"], "arms 'grpo' and 'again' have the same settings; leave one of them out"),
        (["--arm", "x=nothing"], "arm 'x': config 'nothing' is neither a file nor a packaged config"),
        (["--arm", "x=calibrators/soft_penalty+calibrators/calibadv"], "arm 'x': 'calibrators/soft_penalty' and 'cal"),
        (["--run.name", "mine"], "--run.name is set by the study: every run has the folder OUT/ARM/seedK; give --out"),
        (["--seed_everything=3"], "--seed_everything is set by the study: every arm is trained with each of --seeds"),
        (["--ckpt_path", "last"], "--ckpt_path is set by the study: unfinished runs continue from their last"),
        (["--model.learningrate", "1"], "option --model.learningrate is not accepted; did you mean"),
        (["--model.learning_rate", "fast"], "model.learning_rate: 'fast' is not accepted; it must be a number"),
        (["--trainer.max_steps", "5"], "trainer.max_steps is 5; it must stay -1"),
        (["--trainer.max_time", "00:01:00:00"], "trainer.max_time would end the runs of a study after a random number"),
        (
            ["--arm", "x=protocols/no_prepend", "--model.protocol.prepend_think", "true"],
            "arm 'x': --model.protocol.prepend_think would override 'protocols/no_prepend' of this arm; leave one",
        ),
        (["--seeds", "1", "one"], "seeds: 'one' is not accepted; it must be a whole number"),
        (["--seeds", "0"], "--seeds has 0 twice; give each seed once"),
        (["--seeds", "-1"], "--seeds has -1; a seed is a whole number from 0 to 4294967295"),
        (["--jobs", "0"], "--jobs is 0; it must be at least 1"),
        (["--threads", "0"], "--threads is 0; it must be at least 1"),
        (["--baseline", "ppo"], "--baseline is 'ppo'; it must be one of the arms: grpo"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(more: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "x"
    assert message in refusal(lambda: study(words(*more, out=out)))
    assert not out.exists()


def test_arms_that_differ_only_in_what_they_leave_behind(tmp_path: Path) -> None:
    (tmp_path / "often.yaml").write_text("rollouts: {every_n_rollout_steps: 3}")
    more = words("--arm", f"often={tmp_path / 'often.yaml'}", out=tmp_path / "x")
    assert "arms 'grpo' and 'often' have the same settings" in refusal(lambda: study(more))


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("model: {learning_rate: fast}", "arm 'last': model.learning_rate: 'fast' is not accepted"),
        ("model: {clip_norm: -1}", "arm 'last': "),
        (
            "trainer: {callbacks+: [{class_path: calibadv.callbacks.AdvantageCalibration, init_args: {calibrators: "
            "[{class_path: calibadv.calibrators.AnswerRebalance, init_args: {target_ratio: -1}}]}}]}",
            "arm 'last': target_ratio is -1.0; it must be",
        ),
        ("seed_everything: 3", "arm 'last': 'seed_everything' of"),
        ("run: {name: mine}", "arm 'last': 'run.name' of"),
    ],
)
def test_a_mistake_in_the_last_arm_shows_at_once_and_names_it(overlay: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "last.yaml").write_text(overlay)
    more = ("--arm", f"last={tmp_path / 'last.yaml'}")
    assert message in refusal(lambda: study(words(*more, out=tmp_path / "x")))
    assert not (tmp_path / "x").exists()


def test_what_is_missing_is_named() -> None:
    assert "--out VALUE and --seeds VALUE are missing" in refusal(lambda: study(["--arm", "grpo"]))


def test_two_studies_in_one_folder(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".study.lock"):
        message = refusal(lambda: study(words(out=tmp_path)))
    assert message == f"another study is running in {tmp_path}; wait for it, or choose another --out"
    assert [path.name for path in tmp_path.iterdir()] == [".study.lock"]


def test_the_folder_of_a_run_does_not_become_a_study(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {rollout_steps: 3}\n")
    assert refusal(lambda: study(words(out=tmp_path))) == f"'{tmp_path}' is the folder of a run; choose another --out"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_that_is_not_of_the_study_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "grpo" / "seed0" / "precious"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    assert "exists and is not part of this study" in refusal(lambda: study(words(out=tmp_path)))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [precious]


def test_a_file_in_the_place_of_an_arm_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "grpo").write_text("mine")
    assert f"{tmp_path / 'grpo'} exists and is not part of this study" in refusal(lambda: study(words(out=tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["grpo"]


# --- a second call


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that has been begun, and no run of it."""
    out = tmp_path_factory.mktemp("begun")
    overlay = out / "slower.yaml"
    overlay.write_text("model: {learning_rate: 1.0e-4}")
    _, given = read_study(words("--arm", f"slower={overlay}", out=out))
    given.write(out)
    return out


def second(begun: Path, *more: str) -> StudyManifest:
    _, given = read_study([*words(*more, out=begun), "--arm", f"slower={begun / 'slower.yaml'}"])
    return plan_study(given, begun)


def test_the_same_call_continues(begun: Path) -> None:
    assert second(begun) == StudyManifest.read(begun)


def test_further_seeds_and_arms_extend(begun: Path) -> None:
    manifest = second(begun, "--seeds", "7", "--arm", "soft=calibrators/soft_penalty")
    assert manifest.seeds == [0, 7]
    assert list(manifest.arms) == ["grpo", "slower", "soft"]


def test_an_arm_of_an_earlier_call_under_another_name_is_refused(begun: Path) -> None:
    _, given = read_study([*FIT, "--arm", "again", "--seeds", "0", "--out", str(begun)])
    assert refusal(lambda: plan_study(given, begun)).startswith("arms 'grpo' and 'again' have the same settings")


def test_what_an_earlier_call_named_stays(begun: Path) -> None:
    _, given = read_study([*FIT, "--arm", "grpo", "--seeds", "5", "--out", str(begun)])
    manifest = plan_study(given, begun)
    assert (list(manifest.arms), manifest.seeds) == (["grpo", "slower"], [0, 5])


def test_another_setting_is_refused_and_named(begun: Path) -> None:
    message = refusal(lambda: second(begun, "--model.group_size", "3"))
    assert message.startswith(f"the study in {begun} was begun with other settings: model.group_size 2 (now 3); give")


def test_another_content_of_an_overlay_is_refused_and_named(begun: Path, tmp_path: Path) -> None:
    (tmp_path / "slower.yaml").write_text("model: {learning_rate: 2.0e-4}")
    _, given = read_study(words("--arm", f"slower={tmp_path / 'slower.yaml'}", out=begun))
    assert "other settings: arm 'slower': model.learning_rate 0.0001 (now 0.0002);" in refusal(
        lambda: plan_study(given, begun)
    )


def test_other_threads_and_other_versions_are_refused_and_named(begun: Path) -> None:
    assert "other settings: --threads 1 (now 2);" in refusal(lambda: second(begun, "--threads", "2"))
    manifest = StudyManifest.read(begun)
    assert manifest is not None
    older = replace(manifest, versions={**manifest.versions, "torch": "2.0.0"})
    newer = manifest.versions["torch"]
    assert f'torch "2.0.0" (now "{newer}")' in refusal(lambda: older.extended(manifest, begun))


def test_files_and_parts_that_have_changed_are_refused_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    part, questions, policy = tmp_path / "my_part.py", tmp_path / "mine.jsonl", tmp_path / "policy"
    policy.mkdir()
    for path in (part, questions, policy / "model.safetensors"):
        path.write_text("one")
    settings = {
        "trainer": {"callbacks": [{"class_path": "my_part.Mine"}], "default_root_dir": str(tmp_path)},
        "data": {"train": [str(questions)], "validation": "embedded"},
        "model": {"rollout_steps": 6, "policy": str(policy), "reward": {"class_path": "calibadv.rewards.F1"}},
    }
    sources = source_fingerprints([settings])
    assert list(sources) == ["calibadv", "my_part.Mine", str(questions), str(policy)]
    manifest = replace(small_manifest(["grpo"], [0]), arms={"grpo": settings}, sources=sources)
    manifest.check_unchanged()
    for path, name in (
        (part, "my_part.Mine"),
        (questions, str(questions)),
        (policy / "model.safetensors", str(policy)),
    ):
        path.write_text("two")
        message = f"{name} has changed since the study began"
        assert refusal(manifest.check_unchanged).startswith(message)
        assert message in refusal(
            lambda: manifest.extended(replace(manifest, sources=source_fingerprints([settings])), tmp_path)
        )
        path.write_text("one")
    manifest.check_unchanged()
    other = replace(manifest, sources={**sources, "calibadv": "other"})
    assert refusal(other.check_unchanged).startswith(
        "the code of calibadv has changed since the study began: put it back"
    )


def test_both_ends_of_a_large_file_count(tmp_path: Path) -> None:
    weights = tmp_path / "weights"

    def digest(place: int, byte: bytes) -> str:
        with weights.open("wb") as file:
            file.truncate(70 << 20)
            file.seek(place)
            file.write(byte)
        return source_fingerprints([{"model": {"policy": str(weights)}}])[str(weights)]

    same = digest(0, b"\0")
    assert digest(0, b"1") != same
    assert digest((70 << 20) - 1, b"1") != same


def test_a_damaged_record_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"arms":')
    assert "is not the manifest of a study" in refusal(lambda: study(words(out=tmp_path)))
    assert (tmp_path / "study.json").read_text() == '{"arms":'


# --- runs


def small_manifest(arms: Sequence[str], seeds: Sequence[int], steps: int = 6) -> StudyManifest:
    settings: dict[str, Any] = {"model": {"rollout_steps": steps}}
    return StudyManifest(dict.fromkeys(arms, settings), list(seeds), 1, versions(), {})


@given(
    st.lists(st.sampled_from(["grpo", "soft", "calibadv"]), min_size=1, unique=True),
    st.lists(st.integers(0, 9), min_size=1, unique=True),
)
def test_every_arm_has_a_seed_before_any_has_the_next(arms: list[str], seeds: list[int]) -> None:
    order = [(run.seed, run.arm) for run in study_runs(small_manifest(arms, seeds), Path("x"))]
    assert order == list(product(seeds, arms))


def test_one_command_starts_continues_or_finishes_a_run(tmp_path: Path) -> None:
    run = StudyRun(tmp_path, "grpo", 3, steps=6)
    expected = ["fit", "--config", f"{tmp_path}/grpo/arm.yaml", "--seed_everything", "3"]
    assert run.fit_arguments == [
        *expected,
        "--run.root",
        f"{tmp_path}/grpo",
        "--run.name",
        "seed3",
        "--ckpt_path",
        "auto",
    ]


def test_progress_is_read_from_what_lies_in_the_folder(tmp_path: Path) -> None:
    run = StudyRun(tmp_path, "grpo", 0, steps=60)
    assert run.progress() == (0, None)
    run.folder.rollouts.mkdir(parents=True)
    run.folder.results.write_text(json.dumps({"rollout_step": 10, "validations": [{"f1": 0.5}, {"f1": 0.75}]}))
    assert run.progress() == (10, 0.75)
    run.folder.rollout_file("train", 20).touch()
    assert run.progress() == (20, 0.75)
    run.folder.results.write_text(json.dumps({"rollout_step": 60, "validations": [{"f1": 0.5}], "final_f1": 0.625}))
    run.mark_finished()
    assert run.progress() == (60, 0.625)


def test_the_table_has_a_line_for_each_arm() -> None:
    runs = list(study_runs(small_manifest(["grpo", "soft"], [0, 1, 2], steps=60), Path("x")))
    done, failed, running, *_ = runs  # grpo/seed0, soft/seed0, grpo/seed1
    state = StudyState(waiting=runs[3:], finished=[done], running={running: None}, failed={failed: "it"})  # type: ignore[dict-item]
    progress = {**dict.fromkeys(runs, (0, None)), done: (60, 0.9), running: (20, 0.625)}
    console = Console(width=120, file=open(os.devnull, "w"), record=True)  # noqa: PTH123, SIM115
    console.print(arm_table(runs, state, progress))
    console.file.close()
    rows = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert rows[2] == ["grpo", "1/3", "1", "0.900", "seed1", "20/60", "F1", "0.625"]
    assert rows[3] == ["soft", "0/3", "2", "1"]


# --- whole studies


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of one protocol with one seed, two steps each."""
    out = tmp_path_factory.mktemp("studies") / "whole"
    assert study(words(*CALIBADV, "--jobs", "2", out=out)) == 0
    return out


def rollouts(run: Path) -> list[dict[str, Any]]:
    lines = (run / "rollouts" / "train-step-000001.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_first_rollouts_of_two_arms_are_identical(whole: Path) -> None:
    one, other = (rollouts(whole / arm / "seed0") for arm in ("grpo", "calibadv"))
    for records in (one, other):
        assert len(records) == 4  # 2 questions x 2 rollouts
        for record in records:
            del record["advantages"]["calibrated"]  # the one thing that the arms do differently
    assert one == other


def test_every_run_has_its_folder_its_log_and_its_threads(whole: Path) -> None:
    for arm in ("grpo", "calibadv"):
        results = json.loads((whole / arm / "seed0" / "results.json").read_text())
        assert (results["rollout_step"], results["seed"], results["threads"]) == (2, 0, 1)
        assert "validation F1" in (whole / arm / "seed0.log").read_text()
    saved, given = ((whole / "calibadv" / name).read_text() for name in ("seed0/config.yaml", "arm.yaml"))
    assert "AnswerRebalance" in saved
    assert "AnswerRebalance" in given
    assert json.loads((whole / "study.json").read_text())["threads"] == 1
    report = json.loads((whole / "report" / "results.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["grpo", "calibadv"]  # as they were given


def test_a_second_call_repeats_no_run_and_writes_the_same_report(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = whole / "report" / "results.json"
    before, text = times(whole), report.read_bytes()
    report.unlink()
    assert study(words(*CALIBADV, out=whole)) == 0
    assert times(whole) == before
    assert report.read_bytes() == text
    assert "2 of 2 runs are finished" in capsys.readouterr().out


def test_compare_writes_the_same_figures_as_the_study(whole: Path, tmp_path: Path) -> None:
    compare([whole], tmp_path / "out")
    report = whole / "report" / "results.json"
    assert (tmp_path / "out" / "results.json").read_bytes() == report.read_bytes()  # grpo first, not by name


def test_fit_leaves_the_folder_of_a_study_alone(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "quickstart", "--run.root", str(whole.parent), "--run.name", whole.name]
    assert calibadv(words) == 2
    assert "is the folder of a study, and not of a run; choose another --run.name" in capsys.readouterr().err
    assert not (whole / "config.yaml").exists()


@pytest.mark.parametrize("place", [".", "grpo"])
def test_fit_starts_no_run_inside_a_study(whole: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "quickstart", "--run.root", str(whole / place), "--run.name", "mine"]
    assert calibadv(words) == 2
    assert "is inside the folder of a study, which only its own command continues" in capsys.readouterr().err
    assert not (whole / place / "mine").exists()


def test_a_report_is_not_written_among_the_files_of_a_study_or_a_run(whole: Path) -> None:
    for folder in (whole, whole / "grpo" / "seed0"):
        with pytest.raises(ValueError, match="is the folder of a run or a study, whose files it would mix with"):
            compare([whole], folder)


def times(out: Path) -> dict[Path, int]:
    """When each file of a run was written."""
    return {path: path.stat().st_mtime_ns for path in out.glob("*/seed*/**/*") if path.is_file()}


PROGRAM = [sys.executable, "-m", "calibadv.cli.main", "study"]
# Enough steps for a kill to fall between checkpoints; validations and checkpoints are not always due together.
STEPS = ("--model.rollout_steps", "6", "--trainer.val_check_interval", "2", "--checkpoint.every_n_rollout_steps", "3")
LONGER = [*FIT, *STEPS, "--arm", "grpo", *CALIBADV, "--seeds", "0", "1", "--out", "x", "--jobs", "2"]


def start(folder: Path, words: Sequence[str] = LONGER) -> subprocess.Popen[str]:
    """A study in a folder of its own, so that all paths are the same in each."""
    folder.mkdir(exist_ok=True)
    pipe = subprocess.PIPE
    return subprocess.Popen([*PROGRAM, *words], cwd=folder, stdout=pipe, stderr=pipe, text=True)


def written(folder: Path) -> int:
    return sum(path.is_file() for path in folder.glob("x/*/seed*/**/*"))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "here"
    process = start(folder)
    _, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    return folder


def runs_under(process: subprocess.Popen[str]) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(number) for number in found.stdout.split()]


def kill_with_runs(process: subprocess.Popen[str]) -> None:
    """As a machine does that goes down."""
    for number in [process.pid, *runs_under(process)]:
        os.kill(number, signal.SIGKILL)
    process.communicate()


@pytest.mark.long
@pytest.mark.parametrize("repetition", range(2))
def test_a_study_that_is_killed_and_started_again_has_the_same_results(
    repetition: int, undisturbed: Path, tmp_path: Path
) -> None:
    moment = random.randrange(1, written(undisturbed))
    process = start(tmp_path)
    wait_until(lambda: written(tmp_path) >= moment, process)
    kill_with_runs(process)
    done = [path.parent for path in tmp_path.glob("x/*/seed*/finished")]
    before = {run: times(tmp_path / "x")[run / "results.json"] for run in done}

    process = start(tmp_path)
    _, error = process.communicate()
    where = f"killed when {moment} files were there"
    assert (process.returncode, error) == (0, ""), where
    results = Path("x/report/results.json")
    assert (tmp_path / results).read_bytes() == (undisturbed / results).read_bytes(), where
    assert {run: times(tmp_path / "x")[run / "results.json"] for run in done} == before, where
    for run in undisturbed.glob("x/*/seed[01]"):
        assert curves(tmp_path / run.relative_to(undisturbed)) == curves(run), where


@pytest.mark.long
def test_a_signal_lets_the_runs_save_and_the_printed_command_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_until(lambda: written(tmp_path) >= 8, process)  # in the first two runs
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 130, out
    assert "SIGINT: each run finishes its step, then saves; once more to stop at once" in out
    assert "stopped by SIGINT, 0 of 4 runs are finished; to continue:" in out
    assert out.splitlines()[-1].split() == ["calibadv", "study", *LONGER]
    for run in tmp_path.glob("x/*/seed0"):
        assert (run / "checkpoints" / "last.ckpt").exists()
    process = start(tmp_path)
    assert process.communicate()[1] == ""
    results = Path("x/report/results.json")
    assert (tmp_path / results).read_bytes() == (undisturbed / results).read_bytes()
    resumed = [run.name for run in tmp_path.glob("x/*/seed0") if any(run.glob("config-resume-*.yaml"))]
    assert len(resumed) == 2


@pytest.mark.long
def test_when_a_study_is_killed_its_runs_stop_by_themselves(tmp_path: Path) -> None:
    process = start(tmp_path, [*LONGER, "--model.rollout_steps", "100000"])
    wait_until(lambda: written(tmp_path) >= 8, process)
    process.kill()
    process.communicate()
    for lock in tmp_path.glob("x/*/.seed0.lock"):
        with FileLock(lock, timeout=60):
            assert "stopped by SIGTERM after rollout step" in (lock.parent / "seed0.log").read_text()


@pytest.mark.long
def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: {protocol: {max_rollout_tokens: 8}}")  # shorter than any prompt
    process = start(tmp_path, [*WORDS, "--arm", "broken=broken.yaml", "--baseline", "broken", "--out", "x"])
    out, _ = process.communicate()
    assert process.returncode == 1
    assert re.search(r"broken/seed0 failed: calibadv: error: .*8.*\n  x/broken/seed0\.log\n", out)
    assert "1 of 2 runs are finished; to repeat the others:" in out
    figures = json.loads((tmp_path / "x" / "report" / "results.json").read_text())
    assert figures["warnings"] == [
        "broken/seed0 failed, and is not in this report",
        "no run of broken is finished, so grpo is the baseline instead",
    ]
    assert [row["name"] for row in figures["arms"]] == ["grpo"]


@pytest.mark.long
def test_a_run_that_is_killed_is_named_with_the_signal_and_changes_no_baseline(tmp_path: Path) -> None:
    arms = ("--arm", "b", "--arm", "a=calibrators/calibadv")
    process = start(tmp_path, [*FIT, *arms, "--seeds", "0", "1", "--out", "x", "--jobs", "1"])
    wait_until(lambda: (tmp_path / "x" / "b" / "seed0").exists(), process)
    (run,) = runs_under(process)
    os.kill(run, signal.SIGKILL)
    out, _ = process.communicate()
    assert process.returncode == 1
    assert "b/seed0 failed: killed by SIGKILL, as the system does when it is out of memory\n  x/b/seed0.log" in out
    figures = json.loads((tmp_path / "x" / "report" / "results.json").read_text())
    assert [row["name"] for row in figures["arms"]] == ["b", "a"]
    assert figures["baseline"] == "b"
    assert figures["warnings"][0] == "b/seed0 failed, and is not in this report"
