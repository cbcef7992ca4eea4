from __future__ import annotations

import argparse
import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from jsonargparse import ArgumentParser
from support.fits import SMALL, files, fit, results
from support.records import answer, rollout, search

from calibadv import calibrators, callbacks, engines, estimators, losses, retrieval, rewards
from calibadv.cli.command_table import COMMANDS
from calibadv.cli.commands import command_parser
from calibadv.cli.main import main
from calibadv.config.files import read_words
from calibadv.config.help import VERBS
from calibadv.config.lightning_cli import CalibadvCLI
from calibadv.config.logging import quiet_environment
from calibadv.runs.rollouts import read_rollouts, rollout_to_json, write_records
from calibadv.world import embedded_world

TYPED = [name for name, command in COMMANDS.items() if command.functions]
PROGRAM = [sys.executable, "-m", "calibadv.cli.main"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    root = tmp_path_factory.mktemp("cli")
    assert fit(root, "run", "--config", "calibrators/calibadv", "--model.rollout_steps", "2") == 0
    return root / "run"


class Unbuilt(CalibadvCLI):
    """Reads settings, and builds nothing."""

    def instantiate_classes(self) -> None:
        pass


def verb_parser(verb: str) -> argparse.ArgumentParser:
    quiet_environment()
    cli = Unbuilt(verb, read_words(["--config", "quickstart"]))
    return cli._parser(cli.verb)


def blank(parser: argparse.ArgumentParser) -> list[str]:
    """Options without a text of their own; jsonargparse adds the type and the default to every one."""
    shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    return [action.dest for action in shown if not re.sub(r"\(type:.*|\(required.*", "", action.help or "").strip()]


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"calibadv \d+\.\d+\S* \(python \S+, torch \S+, .*\)\n", capsys.readouterr().out)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_verb_has_a_text(verb: str) -> None:
    assert blank(verb_parser(verb)) == []


@pytest.mark.parametrize("command", TYPED)
def test_every_option_of_a_typed_command_has_a_text(command: str) -> None:
    parser = command_parser(command)
    below = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    parsers = [parser, *(sub for choices in below for sub in choices.values())]
    assert [blank(one) for one in parsers] == [[]] * len(parsers)
    assert len(parsers) == (3 if command == "world" else 1)


@pytest.mark.parametrize("package", [calibrators, callbacks, engines, estimators, losses, retrieval, rewards])
def test_every_parameter_of_a_part_has_a_text(package: ModuleType) -> None:
    """What --model.retriever.help BM25 and the like would print."""
    classes = [part for part in map(vars(package).get, package.__all__) if inspect.isclass(part)]
    assert classes
    for part in classes:
        parser = ArgumentParser()
        parser.add_class_arguments(part, as_group=False)
        assert blank(parser) == [], part


def test_help_lists_each_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.summary}" in text


@pytest.mark.parametrize("words", ["fit", "test", *TYPED, "world export", "world policy"])
def test_help_of_a_command(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out.replace("[options] ", "")
    assert text.startswith(f"usage: calibadv {words} ")


def printed_config(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words, "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_printed_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--config", "quickstart", "--config", "calibrators/calibadv", "--model.group_size", "3")
    text = printed_config(capsys, *words)
    assert "group_size: 3" in text
    assert "target_ratio: 1.0" in text
    (tmp_path / "printed.yaml").write_text(text)
    assert printed_config(capsys, "--config", str(tmp_path / "printed.yaml")) == text


def test_the_saved_config_repeats_the_run(run: Path) -> None:
    assert main(["fit", "--config", str(run / "config.yaml"), "--run.name", "again"]) == 0
    assert results(run.parent / "again") == results(run)
    assert (run.parent / "again" / "config.yaml").read_text() == (run / "config.yaml").read_text()


def test_a_run_leaves_its_files_and_no_others(run: Path) -> None:
    names = {re.sub(r"(tfevents)\..*", r"\1", name) for name in files(run)}
    assert names == {
        "config.yaml",
        "events.out.tfevents",
        "results.json",
        "checkpoints/last.ckpt",
        "checkpoints/rollout-step=000002.ckpt",
        "rollouts/train-step-000001.jsonl",
        "rollouts/val-step-000000.jsonl",
        "rollouts/val-step-000002.jsonl",
    }


def test_results_say_what_was_run(run: Path) -> None:
    content = json.loads((run / "results.json").read_text())
    assert content["command"].startswith("calibadv fit --config quickstart --data.questions_per_step 2")
    assert (content["seed"], content["rollout_step"], content["name"]) == (0, 2, "run")
    assert [row["step"] for row in content["validations"]] == [0, 2]
    f1 = [row["f1"] for row in content["validations"]]
    assert (content["best_f1"], content["final_f1"]) == (max(f1), sum(f1) / 2)
    assert sum(content["statuses"].values()) == 2 * 2 * 2


def test_on_a_terminal_a_bar_shows_score_and_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert fit(tmp_path, "run", "--model.rollout_steps", "2") == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert re.search(r"2/2 score [01]\.\d\d  [\d.]+ s/step +\d:\d\d:\d\d left", shown)


def test_without_a_logger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "run", "--model.rollout_steps", "1", "--trainer.logger", "false") == 0
    assert "results.json" in files(tmp_path / "run")
    assert not any("tfevents" in name for name in files(tmp_path / "run"))


def test_test_prints_a_table_per_source_into_the_run_of_the_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = embedded_world().questions["test"]
    questions = tmp_path / "mine.jsonl"
    sources = ["hotpotqa", "hotpotqa", "a source with a long name, longer than there is room for"]
    rows = [
        {"id": q.id, "question": q.question, "golden_answers": q.golden_answers, "data_source": source}
        for q, source in zip(world, sources, strict=False)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = files(run)
    last = run / "checkpoints" / "last.ckpt"
    assert main(["test", "--config", "quickstart", f"--data.test={questions}", f"--ckpt_path={last}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["source", "score", "F1", "EM", "cover", "EM", "valid", "searches", "questions"]
    assert [(line[0], line[-1]) for line in lines[2:5]] == [("all", "3"), ("a", "1"), ("hotpotqa", "2")]
    assert lines[5] == ["statuses", "answered", "3"]
    assert len(lines) == 8  # no row takes two lines; then where results and rollouts are
    written = files(run)
    assert {name for name in written if written[name] != before.get(name)} == {
        "results.json",
        "rollouts/test-step-000002.jsonl",
    }
    content = json.loads(written["results.json"])
    assert (content["test"]["step"], content["test"]["count"]) == (2, 3)
    assert content["validations"] == json.loads(before["results.json"])["validations"]


@pytest.mark.parametrize("verb", ["validate", "predict"])
def test_an_evaluation_without_a_checkpoint_has_a_folder_named_after_the_verb(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"id": "a", "question": "what is the mayor ?", "golden_answers": ["x"]}\n')
    words = [f"--data.{split}={questions}" for split in ("validation", "test")]
    assert main([verb, "--config", "quickstart", *words, "--run.root", str(tmp_path / "runs")]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"{verb}-quickstart-seed0-\d{{8}}-\d{{6}}", folder.name)
    short = {"validate": "val"}.get(verb, verb)
    (written,) = read_rollouts(folder / "rollouts" / f"{short}-step-000000.jsonl")
    assert written.question.id == "a"
    assert set(files(folder)) == {f"rollouts/{short}-step-000000.jsonl"} | (
        {"results.json"} if verb == "validate" else set()
    )
    assert str(folder / "rollouts") in capsys.readouterr().out


@pytest.mark.parametrize("second", ["--config calibrators/calibadv", "calibrators/calibadv"])
def test_replay_takes_several_overlays(
    second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = f"--config reward.yaml {second}"
    (tmp_path / "reward.yaml").write_text("model: {reward: ExactMatch}")
    good, bad = rollout(search("a", "b"), answer("gold")), rollout(search("a", "x"), answer("gold not"), sample=1)
    write_records(tmp_path / "in.jsonl", [rollout_to_json(good), rollout_to_json(bad)])
    assert main(["replay", "--rollouts", "in.jsonl", *words.split(), "--out", "out.jsonl"]) == 0
    assert capsys.readouterr().out.endswith("\nwrote out.jsonl\n")
    _, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert second["score"] == 0.0  # its F1 is 2/3
    # its search found a of {a, x}: half the penalty of -0.7071
    assert second["advantages"]["calibrated"][0] == pytest.approx(-0.35355, abs=1e-4)


def test_the_world_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["world", "export", "--out", str(tmp_path / "world")]) == 0
    assert set(files(tmp_path / "world")) == {"corpus.jsonl", "train.jsonl", "validation.jsonl", "test.jsonl"}
    assert capsys.readouterr().out == f"wrote {tmp_path / 'world'}\n"


OUR_LINES = (
    r"step +\d+  score [\d.]+  f1 [\d.]+  em [\d.]+  cover_em [\d.]+  format_valid [\d.]+  searches [\d.]+",
    r"validation F1 [\d.]+ \(step 0\) -> [\d.]+ \(step 1\)",
    r"(curves      tensorboard --logdir|checkpoint |results    |rollouts   ) \S+",
)


@pytest.mark.long
def test_a_run_prints_our_own_lines_only(tmp_path: Path) -> None:
    words = ["fit", "--config", "quickstart", *SMALL, "--model.rollout_steps", "1", "--run.root", str(tmp_path)]
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    # Two groups of two rollouts may tie, of which a block tells.
    lines = [line for line in done.stdout.splitlines() if line[0] not in "┏┃┗"]
    assert [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in OUR_LINES)] == []
    assert len(lines) == 7


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.long
def test_control_c_writes_a_checkpoint_and_the_printed_command_goes_on(tmp_path: Path) -> None:
    words = ["fit", "--config", "quickstart", *SMALL, "--run.name", "mine", "--model.rollout_steps"]
    process = subprocess.Popen(
        [*PROGRAM, *words, "1000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    wait_for(tmp_path / "runs" / "mine" / "rollouts" / "train-step-000001.jsonl", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    step = int(
        re.search(r"SIGINT: finishing rollout step (\d+), unless it waits for the retriever, then saving; once", err)[1]
    )  # type: ignore[index]
    *_, last = out.splitlines()
    assert f"stopped by SIGINT after rollout step {step} of 1000; to continue:" in out
    assert last.strip() == "calibadv " + shlex.join([*words, "1000", "--ckpt_path", "last"]).replace(
        "--run.name mine --model.rollout_steps 1000", "--model.rollout_steps 1000 --run.name mine"
    )
    resume = [str(step + 1) if word == "1000" else word for word in shlex.split(last)[1:]]
    done = subprocess.run([*PROGRAM, *resume], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert results(tmp_path / "runs" / "mine")["rollout_step"] == step + 1


@pytest.mark.long
def test_sigterm_before_training_ends_the_process_at_once(tmp_path: Path) -> None:
    words = ["fit", "--config", "quickstart", *SMALL, "--run.root", str(tmp_path / "runs")]
    process = subprocess.Popen([*PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("", "")
    assert process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert not (tmp_path / "runs").exists()
