"""The comparison of runs: hand-made run folders, whose results can be computed on paper."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from calibadv.analysis.compare.charts import Chart, chart_svg
from calibadv.analysis.compare.command import compare, compare_runs, write_report
from calibadv.analysis.compare.curve_docs import curve_description
from calibadv.analysis.compare.curves import read_curves, seed_band, step_windows
from calibadv.analysis.compare.differences import add_verdicts
from calibadv.protocol import SearchProtocol
from calibadv.rewards import F1
from calibadv.rewards.scoring import score_rollouts
from calibadv.runs.rollouts import write_rollouts
from calibadv.runs.summary import summarize_run
from calibadv.types import Question, Rollout, RolloutStatus, Segment

CALIBADV = [{"class_path": "calibadv.callbacks.AdvantageCalibration", "init_args": {"calibrators": []}}]
FAILED = "search failed"
RIGHT, WRONG, HALF = "right", "wrong", "right but not only that"  # F1 of the last: 2 * 1 / (5 + 1) = 1/3
FILES = ["figure.png", "figure.svg", "report.html", "report.md", "results.json", "timing.json"]


def write_curves(folder: Path, curves: dict[str, dict[int, float]], **options: Any) -> None:
    with SummaryWriter(str(folder), **options) as writer:
        for tag, curve in curves.items():
            for step, value in curve.items():
                writer.add_scalar(tag, value, step)


def answered(number: int, answer: str, question: str) -> Rollout:
    status = RolloutStatus.SEARCH_FAILED if answer == FAILED else RolloutStatus.ANSWERED
    segments = (
        Segment("policy", "<think> t </think> <search> q </search>", 5),
        Segment("environment", "\n\n<information></information>\n\n", 3),
        Segment("policy", f"<think> t </think> <answer> {answer} </answer>", 5),
    )
    asked = Question(f"q{number}", question, ["right"])
    messages = SearchProtocol(prepend_think=False).messages(segments)
    return Rollout(asked, 0, 0, prepend_think=False, segments=segments, status=status, messages=messages)


def write_run(
    folder: Path,
    seed: int,
    answers: Sequence[Sequence[str]],
    callbacks: list[Any] | None = None,
    *,
    planned: int | None = None,
    question: str = "which ?",
    seconds: float = 60.0,
    **model: Any,
) -> None:
    """A run that was validated at steps 0, 10, 20, ...: one row of answers each, one answer for each question."""
    steps = [10 * index for index in range(len(answers))]
    config = {
        "seed_everything": seed,
        "trainer": {"callbacks": callbacks or []},
        "model": {"rollout_steps": planned or steps[-1], "learning_rate": 1e-4, **model},
        "run": {"root": str(folder.parent), "name": folder.name},
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    validations = []
    for step, row in zip(steps, answers, strict=True):
        rollouts = score_rollouts([answered(n, answer, question) for n, answer in enumerate(row)], F1())
        write_rollouts(folder / "rollouts" / f"val-step-{step:06d}.jsonl", rollouts)
        scored = [rollout for rollout in rollouts if rollout.included]
        means = {name: float(np.mean([getattr(r, name) for r in scored])) for name in ("f1", "em", "format_valid")}
        missing = {"search_failed": float(len(rollouts) - len(scored))}
        validations.append({"step": step, **means, **missing})
    results = {
        "rollout_step": steps[-1],
        "seed": seed,
        "threads": 1,
        "device": "cpu",
        "versions": {"calibadv": "0.1.0"},
        "command": f"calibadv fit --seed_everything {seed}",
        "validations": validations,
        **summarize_run(validations),
        "wall_seconds": seconds,
    }
    (folder / "results.json").write_text(json.dumps(results))
    write_curves(folder, {"stability/entropy": dict.fromkeys(range(1, steps[-1] + 1), 0.1 * (seed + 1))})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms and two seeds in the layout of a study, two questions, validated at steps 0 to 30."""
    runs = tmp_path_factory.mktemp("study") / "runs"
    start = [RIGHT, WRONG]
    better, same = [start, [RIGHT, RIGHT], [RIGHT, RIGHT], [RIGHT, RIGHT]], [start] * 4
    write_run(runs / "grpo" / "seed0", 0, same)
    write_run(runs / "grpo" / "seed1", 1, [start, [RIGHT, RIGHT], [WRONG, WRONG], [WRONG, HALF]])
    write_run(runs / "calibadv" / "seed0", 0, better, CALIBADV)
    write_run(runs / "calibadv" / "seed1", 1, better, CALIBADV, seconds=120)
    return runs


def arm(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in results["arms"] if row["name"] == name)


def test_the_figures_of_a_study(study: Path) -> None:
    results, _ = compare_runs([study])
    assert results["baseline"] == "grpo"
    grpo, calibadv = arm(results, "grpo"), arm(results, "calibadv")
    # Seed 0: 1/2 at all validations. Seed 1: the mean of 1, 0 and (0 + 1/3) / 2 = 1/6 is 7/18; EM 1, 0, 0 give 1/3.
    assert grpo["final_f1"]["by_run"] == pytest.approx([0.5, 7 / 18], abs=1e-6)
    assert grpo["final_f1"]["mean"] == pytest.approx((0.5 + 7 / 18) / 2, abs=1e-6)
    assert grpo["final_em"]["by_run"] == pytest.approx([0.5, 1 / 3], abs=1e-6)
    assert grpo["best_f1"]["by_run"] == [0.5, 1.0]
    # Seed 1 fell from 1 to 7/18 for good, at step 20.
    # Wilson: centre (1 + z^2/2) / (2 + z^2) = 1/2, half width z sqrt(1/2 + z^2/4) / (2 + z^2) = 0.4055.
    share = {"low": pytest.approx(0.0945, abs=1e-4), "high": pytest.approx(0.9055, abs=1e-4)}
    assert grpo["collapsed"] == {"runs": 1, "of": 2, **share, "when": [{"seed": 1, "step": 20}]}
    assert (grpo["questions"], results["shared_settings"]["model.learning_rate"]) == (2, "0.0001")
    assert calibadv["final_f1"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "by_run": [1.0, 1.0]}
    gap = calibadv["difference"]
    assert gap["final_f1"]["by_seed"] == pytest.approx([0.5, 11 / 18], abs=1e-6)
    assert gap["final_f1"]["mean"] == pytest.approx(5 / 9, abs=1e-6)
    # By question: seed 0 differs by 0 and 1, seed 1 by 2/3 (of its 1, 0, 0) and 5/9 (of its 1, 0, 1/3). A draw holds
    # one question twice with probability 1/2, so the ends are those of a single question: 0 (seed 0 twice, question 0
    # twice: 1/16 of the draws) and 1.
    assert (gap["final_f1"]["low"], gap["final_f1"]["high"]) == (0, 1)
    assert (gap["p"], gap["p_holm"], gap["smallest_p"], gap["over"]) == (0.5, 0.5, 0.5, "seeds and questions")
    assert gap["verdict"].startswith("calibadv is not distinguishable from grpo in final F1: +0.556 [+0.000, +1.000]")
    assert results["untrained"][0]["arms"] == ["calibadv", "grpo"]
    assert results["untrained"][0]["f1"] == {"mean": 0.5, "low": 0, "high": 1, "by_run": [0.5]}
    assert results["settings"] == {
        "trainer.callbacks": {"calibadv": "[AdvantageCalibration(calibrators=[])]", "grpo": "[]"}
    }
    assert results["comparisons"] == {"tested": 1, "correction": "Holm"}
    assert results["warnings"] == []


def test_the_same_runs_elsewhere_and_later_give_the_same_results(study: Path, tmp_path: Path) -> None:
    moved = tmp_path / "deep" / "copy"
    shutil.copytree(study, moved)
    run = moved / "grpo" / "seed1"
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, "wall_seconds": 999.0, "command": "calibadv fit again"}))
    resumed = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config-resume-000010.yaml").write_text(yaml.safe_dump({**resumed, "ckpt_path": "last"}))
    compare([study], tmp_path / "first")
    compare([moved], tmp_path / "second")
    first, second = ((tmp_path / name / "results.json").read_bytes() for name in ("first", "second"))
    assert first == second
    timing = json.loads((tmp_path / "second" / "timing.json").read_text())
    assert timing["runs"]["grpo/seed1"]["wall_seconds"] == 999
    assert timing["mean_wall_seconds"] == {"calibadv": 90, "grpo": pytest.approx((60 + 999) / 2)}
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == FILES


class Page(HTMLParser):
    """Collects what a page would fetch, its ids, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.fetched.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_a_report_says_what_was_run(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "runs")
    for run in (tmp_path / "runs").glob("*/*"):
        results = json.loads((run / "results.json").read_text())
        made_on = {"machine": {"processor": "Abacus 3000", "cores": 7, "platform": "wood"}}
        (run / "results.json").write_text(json.dumps({**results, **made_on}))
    results, arms = compare_runs([tmp_path / "runs"])
    write_report(tmp_path / "out", results, arms, "calibadv study --config quickstart")
    for name in ("report.html", "report.md"):
        page = (tmp_path / "out" / name).read_text()
        for text in ("calibadv study --config quickstart", "Abacus 3000", "cores 7", "model.learning_rate", "0.0001"):
            assert text in page
        assert "on 2 questions at the rollout steps 0, 10, 20, 30" in page


def test_a_report_without_a_figure_shows_none_and_leaves_none(study: Path, tmp_path: Path) -> None:
    compare([study], tmp_path / "out")
    assert "figure.svg" in (tmp_path / "out" / "report.md").read_text()
    write_curves(tmp_path / "other", {"stability/entropy": {1: 0.5, 2: 0.4}})
    compare([tmp_path / "other"], tmp_path / "out")
    assert "figure.svg" not in (tmp_path / "out" / "report.md").read_text()
    assert not list((tmp_path / "out").glob("figure.*"))


def test_curves_of_filtered_groups_are_warned_of(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "runs")
    write_curves(tmp_path / "runs" / "calibadv" / "seed0", {"filter/asked": {1: 3.0}})
    (warning,) = compare_runs([tmp_path / "runs"])[0]["warnings"]
    assert warning.startswith("calibadv dropped groups by a filter: curves of training")


def test_the_page_stands_alone_and_trusts_no_name(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study / "calibadv", tmp_path / "runs" / "<img src=x>|")
    shutil.copytree(study / "grpo", tmp_path / "runs" / "grpo")
    compare([tmp_path / "runs"], tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    page = Page(text)
    assert page.fetched == []
    assert "img" not in page.tags
    assert "&lt;img src=x&gt;| is not distinguishable from grpo" in text
    assert len(set(page.ids)) == len(page.ids)
    assert {"val/f1", "val/em", "stability/entropy"} <= set(page.ids)
    rows = [
        line for line in (tmp_path / "report" / "report.md").read_text().splitlines() if line.startswith("| &lt;img")
    ]
    assert rows
    assert all("|\\|" not in row and "src=x>\\| |" in row for row in rows)
    figure = (tmp_path / "report" / "figure.svg").read_text()
    assert "prefers-color-scheme:dark" in figure
    assert Page(figure).fetched == []


def test_a_run_that_is_not_finished_is_named_and_in_no_table(study: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(study, runs)
    write_run(runs / "grpo" / "seed2", 2, [[RIGHT, WRONG], [WRONG, WRONG]], planned=30)
    results, _ = compare_runs([runs])
    assert len(arm(results, "grpo")["final_f1"]["by_run"]) == 2
    assert results["warnings"] == [
        "grpo/seed2 is not finished (10 of 30 rollout steps): it is in the curves, and in no table",
        "calibadv has no run of seed 2, which other arms have",
    ]


def test_a_run_that_its_guard_stopped_is_not_left_out(study: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(study, runs)
    stopped = runs / "grpo" / "seed2"
    write_run(stopped, 2, [[RIGHT, RIGHT], [WRONG, WRONG]], planned=30)
    results = json.loads((stopped / "results.json").read_text())
    (stopped / "results.json").write_text(json.dumps({**results, "stopped_by_guard": True}))
    results, _ = compare_runs([runs])
    assert arm(results, "grpo")["final_f1"]["by_run"][2] == 0.0  # of the one validation after training
    assert results["warnings"][0] == (
        "grpo/seed2 was stopped by its guard after 10 of 30 rollout steps: its results are those up to that step"
    )


def test_a_resume_with_more_steps_belongs_to_the_longer_arm(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "runs")
    for run in (tmp_path / "runs").glob("*/*"):
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["model"] |= {"rollout_steps": 50} | ({"learning_rate": 1.0} if run.name == "seed1" else {})
        (run / "config-resume-000030.yaml").write_text(yaml.safe_dump(config))
    results, _ = compare_runs([tmp_path / "runs"])
    assert sum("not finished (30 of 50 rollout steps)" in warning for warning in results["warnings"]) == 4
    assert "grpo/seed1: resumed with other settings: model.learning_rate 0.0001 (now 1.0)" in results["warnings"]


def test_different_questions_are_not_compared(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study / "grpo", tmp_path / "grpo")
    for seed in (0, 1):
        write_run(tmp_path / "other" / f"seed{seed}", seed, [[RIGHT, RIGHT]] * 4, CALIBADV, question="who ?")
    results, _ = compare_runs([tmp_path])
    other = arm(results, "other")
    assert other["final_f1"]["mean"] == 1  # its own results stand
    assert other["difference"] == {
        "verdict": "other is not compared with grpo: they were validated on different questions."
    }
    assert results["comparisons"]["tested"] == 0
    assert len(results["untrained"]) == 2


def test_validations_at_other_distances_from_the_end_are_not_compared(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study / "grpo", tmp_path / "grpo")
    for seed in (0, 1):
        write_run(tmp_path / "other" / f"seed{seed}", seed, [[RIGHT, WRONG]] * 4, CALIBADV)
    longer = {"rollout_steps": 50}  # 30, 40, 50 and not 10, 20, 30: more training is a comparison too
    for seed in (0, 1):
        write_run(tmp_path / "longer" / f"seed{seed}", seed, [[RIGHT, WRONG]] * 6, **longer)
    for results in (tmp_path / "other").glob("*/results.json"):
        content = json.loads(results.read_text())
        del content["validations"][2]
        results.write_text(json.dumps(content))
    results, _ = compare_runs([tmp_path])
    assert arm(results, "other")["difference"] == {
        "verdict": "other is not compared with grpo: the validations of their final F1 are at different numbers of "
        "rollout steps before the end of training: 0, 10, 20 in grpo/seed1 and 0, 20 in other/seed1."
    }
    assert arm(results, "longer")["difference"]["seeds"] == [0, 1]


def test_one_seed_is_no_test(study: Path) -> None:
    results, _ = compare_runs([study / name / "seed0" for name in ("grpo", "calibadv")])
    assert arm(results, "calibadv")["difference"]["verdict"] == (
        "calibadv is not tested against grpo: final F1 differs by +0.500 in one seed, which says nothing of others."
    )


def test_what_differs_between_seeds_before_training_is_shown_for_each(study: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_curves(tmp_path / f"run_{seed}", {"val/f1": {0: 0.25 + 0.5 * seed, 10: 0.5}})
    compare([study, tmp_path], tmp_path / "out")
    pages = [(tmp_path / "out" / name).read_text() for name in ("report.md", "report.html")]
    assert "| untrained policy of calibadv, grpo | 0.500 | 0.500 |" in pages[0]
    assert "| untrained policy of run | 0.250 | 0.750 |" in pages[0]
    assert "<td>0.250</td><td>0.750</td>" in pages[1]
    assert pages[0].endswith("timing.json.\n")
    assert "\n\n\n" not in pages[0]


def test_without_rollout_files_the_intervals_are_over_seeds(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "runs")
    (tmp_path / "runs" / "grpo" / "seed1" / "rollouts" / "val-step-000020.jsonl").unlink()
    results, _ = compare_runs([tmp_path / "runs"])
    grpo = arm(results, "grpo")
    assert grpo["over"] == "seeds"
    assert (grpo["final_f1"]["low"], grpo["final_f1"]["high"]) == pytest.approx((7 / 18, 0.5), abs=1e-6)
    assert arm(results, "calibadv")["difference"]["over"] == "seeds"
    assert any(
        "over seeds only" in warning and "no val-step-000020.jsonl" in warning for warning in results["warnings"]
    )


def test_rollouts_of_another_run_are_not_taken_for_its_own(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "runs")
    wrong = study / "calibadv" / "seed0" / "rollouts" / "val-step-000030.jsonl"
    shutil.copy(wrong, tmp_path / "runs" / "grpo" / "seed0" / "rollouts")
    results, _ = compare_runs([tmp_path / "runs"])
    assert any("does not match its results.json" in warning for warning in results["warnings"])
    assert arm(results, "grpo")["over"] == "seeds"


def test_a_question_whose_search_failed_is_in_no_interval(tmp_path: Path) -> None:
    write_run(tmp_path / "grpo" / "seed0", 0, [[WRONG, RIGHT, RIGHT]] * 3 + [[FAILED, RIGHT, RIGHT]])
    results, _ = compare_runs([tmp_path])
    # The run's own figure has it where it was answered: (2/3 + 2/3 + 1) / 3.
    assert arm(results, "grpo")["final_f1"] == {"mean": 0.777778, "low": 1, "high": 1, "by_run": [0.777778]}
    assert results["warnings"] == [
        "grpo: questions whose search failed in a run, and that are in no interval: 1",
        "seed0: searches failed in 1 of 4 validations (most at step 30: 1 without a result): their means are over the "
        "other questions",
    ]


def test_where_no_question_is_left_there_is_no_interval(tmp_path: Path) -> None:
    for seed, row in enumerate(([FAILED, RIGHT], [RIGHT, FAILED])):
        write_run(tmp_path / "grpo" / f"seed{seed}", seed, [[RIGHT, RIGHT]] * 3 + [row])
    results, _ = compare_runs([tmp_path])
    assert arm(results, "grpo")["final_f1"] == {"mean": 1, "low": None, "high": None, "by_run": [1, 1]}


def test_a_difference_that_seeds_and_questions_agree_on(tmp_path: Path) -> None:
    for seed in range(6):
        write_run(tmp_path / "low" / f"seed{seed}", seed, [[WRONG] * 4] * 4)
        write_run(tmp_path / "high" / f"seed{seed}", seed, [[WRONG] * 4] + [[RIGHT] * 4] * 3, CALIBADV)
    results, _ = compare_runs([tmp_path / "low", tmp_path / "high"])
    assert results["baseline"] == "low"  # the first given, where no arm is called grpo
    gap = arm(results, "high")["difference"]
    assert gap["p"] == 2 / 64
    assert (
        gap["verdict"] == "high is higher than low in final F1 by 1.000 [1.000, 1.000], p = 0.0312 over 6 paired seeds."
    )
    results, _ = compare_runs([tmp_path], baseline="high")
    assert arm(results, "low")["difference"]["verdict"].startswith("low is lower than high in final F1 by 1.000 [")


def test_a_verdict_holds_after_correction_for_the_number_of_arms() -> None:
    def found(p: float) -> dict[str, Any]:
        gap = {"mean": 0.2, "low": 0.1, "high": 0.3}
        return {"seeds": list(range(6)), "final_f1": gap, "p": p, "smallest_p": 2 / 64}

    alone, three = {"a": found(0.03)}, {"a": found(0.03), "b": found(0.01), "c": {"verdict": "not compared"}}
    add_verdicts(alone, "grpo")
    add_verdicts(three, "grpo")
    assert alone["a"]["verdict"].endswith(
        "higher than grpo in final F1 by 0.200 [0.100, 0.300], p = 0.03 over 6 paired seeds."
    )
    assert three["b"]["verdict"].endswith("[0.100, 0.300], p = 0.01 (0.02 corrected for 2 tests) over 6 paired seeds.")
    doubtful = {"a": found(0.03), "b": found(0.04)}
    add_verdicts(doubtful, "grpo")
    assert "not established: p = 0.03 (0.06 corrected for 2 tests) over 6 paired" in doubtful["a"]["verdict"]
    assert three["c"] == {"verdict": "not compared"}
    narrow = {"a": found(0.5)}
    narrow["a"]["final_f1"] = {"mean": 0.05, "low": -0.00850049, "high": 0.10650049}  # -0.0085 and 0.1065 in the tables
    add_verdicts(narrow, "grpo")
    assert f"+0.050 [{-0.0085:+.3f}, {0.1065:+.3f}]" in narrow["a"]["verdict"]
    many = {name: found(2 / 64) for name in "abcdefg"}
    add_verdicts(many, "grpo")
    assert (
        "p = 0.0312 (0.219 corrected for 7 tests) over 6 paired seeds (with so few seeds it is never below 0.219)"
        in many["a"]["verdict"]
    )


def test_five_seeds_cannot_establish_a_difference(tmp_path: Path) -> None:
    for seed in range(5):
        write_run(tmp_path / "grpo" / f"seed{seed}", seed, [[WRONG] * 4] * 4)
        write_run(tmp_path / "other" / f"seed{seed}", seed, [[WRONG] * 4] + [[RIGHT] * 4] * 3, CALIBADV)
    verdict = arm(compare_runs([tmp_path])[0], "other")["difference"]["verdict"]
    assert "not established: p = 0.0625 over 5 paired seeds (with so few seeds it is never below 0.0625)" in verdict


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("a/seed0", "a/seed1", "b/seed0", "b/seed1"), ["a", "b"]),
        (("x/a/seed0", "y/a/seed1", "x/b/seed0", "y/b/seed1"), ["a", "b"]),
        (("a-6e-4-0", "a-6e-4-1", "b-6e-4-0", "b-6e-4-1"), ["a-6e-4", "b-6e-4"]),
        (("a/monday", "a/tuesday", "b/monday", "b/tuesday"), ["a", "b"]),
        (("s/a/seed0", "s/a/seed1", "t/a/seed0", "t/a/seed1"), ["a, learning_rate=0.1", "a, learning_rate=0.2"]),
    ],
)
def test_names_of_arms(tmp_path: Path, folders: Sequence[str], names: list[str]) -> None:
    for index, folder in enumerate(folders):
        write_run(tmp_path / folder, index % 2, [[RIGHT]], learning_rate=0.1 if index < 2 else 0.2)
    results, _ = compare_runs([tmp_path / folder for folder in folders])
    assert [row["name"] for row in results["arms"]] == names
    assert [row["seeds"] for row in results["arms"]] == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("first", "second"), ["first", "second"]),
        (
            ("quickstart-seed0-20261129-082453", "quickstart-calibadv-seed1-job17"),
            ["quickstart", "quickstart-calibadv"],
        ),
        (("a-seed0-20261129-082453", "a-seed1-20261129-092453"), ["a, learning_rate=0", "a, learning_rate=1"]),
        (("a/run", "b/run"), ["a", "b"]),
        (("s/grpo/seed0", "t/grpo/seed1"), ["grpo, learning_rate=0", "grpo, learning_rate=1"]),
    ],
)
def test_names_of_single_runs(tmp_path: Path, folders: Sequence[str], names: list[str]) -> None:
    for index, folder in enumerate(folders):
        write_run(tmp_path / folder, index, [[RIGHT]], learning_rate=index)
    results, _ = compare_runs([tmp_path / folder for folder in folders])
    assert [row["name"] for row in results["arms"]] == names


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (["0" + "x" * 80, "1" + "x" * 80], ["0" + "x" * 38 + "...", "1" + "x" * 38 + "..."]),
        (["x" * 80 + "0", "x" * 80 + "1"], ["x" * 80 + "0]", "x" * 80 + "1]"]),
    ],
)
def test_values_in_the_names_of_arms_are_cut_where_that_tells_them_apart(
    tmp_path: Path, values: list[str], shown: list[str]
) -> None:
    for index in range(4):
        write_run(tmp_path / "st"[index // 2] / "a" / f"seed{index}", index, [[RIGHT]], [values[index // 2]])
    results, _ = compare_runs([tmp_path])
    assert [row["name"] for row in results["arms"]] == [f"a, callbacks=[{text}" for text in shown]


def test_arms_of_other_programs_with_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    for folder in product(("x", "y"), ("runs",), ("foreign_0", "foreign_1")):
        write_curves(tmp_path.joinpath(*folder), {"val/f1": {0: 0.5, 1: 0.6}})
    results, _ = compare_runs([tmp_path])
    assert [row["name"] for row in results["arms"]] == ["x/runs/foreign_0", "y/runs/foreign_0"]


def test_arms_stand_as_their_study_has_them_and_others_by_name(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "runs")
    assert [row["name"] for row in compare_runs([tmp_path / "runs"])[0]["arms"]] == ["calibadv", "grpo"]
    record = tmp_path / "runs" / "study.json"
    record.write_text(json.dumps({"arms": {"grpo": {}, "calibadv": {}}}))
    assert [row["name"] for row in compare_runs([tmp_path / "runs"])[0]["arms"]] == ["grpo", "calibadv"]
    record.write_text("{}")  # of another program
    assert [row["name"] for row in compare_runs([tmp_path / "runs"])[0]["arms"]] == ["calibadv", "grpo"]


def test_runs_inside_the_folder_of_a_run_are_named(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study / "grpo" / "seed0", tmp_path / "first")
    shutil.copytree(study, tmp_path / "first" / "more")
    (warning,) = compare_runs([tmp_path / "first"])[0]["warnings"]
    inside = "more/calibadv/seed0, more/calibadv/seed1, more/grpo/seed0, more/grpo/seed1"
    assert warning == f"first: the runs inside its folder are not compared ({inside}); move them out"


def test_runs_of_another_program(study: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        theirs = {"critic/val_f1": {0: 0.2, 5: 0.8, 10: 0.6 + 0.1 * seed}, "actor/entropy": {1: 0.3, 2: 0.2}}
        write_curves(tmp_path / "theirs" / f"run_{seed}", theirs)
    names = tmp_path / "names.yaml"
    names.write_text("val/f1: critic/val_f1\nstability/entropy: actor/entropy\n")
    results, arms = compare_runs([study, tmp_path / "theirs"], names=names)
    row = arm(results, "run")
    assert row["final_f1"]["by_run"] == pytest.approx([1.4 / 2, 1.5 / 2], abs=1e-6)  # steps 5 and 10
    assert row["over"] == "seeds"
    assert "final_em" not in row
    assert "is of another program" in row["difference"]["verdict"]
    assert any(warning.startswith("run: format validity is not known") for warning in results["warnings"])
    assert arms[-1].runs[0].curves["stability/entropy"] == pytest.approx({1: 0.3, 2: 0.2})
    write_report(tmp_path / "report", results, arms)
    assert "0.725 [0.700, 0.750]" in (tmp_path / "report" / "report.md").read_text()


def test_a_name_map_that_does_not_fit(study: Path, tmp_path: Path) -> None:
    write_curves(tmp_path / "theirs", {"critic/val_f1": {0: 0.2}})
    names = tmp_path / "names.yaml"
    for text, message in [
        ("val/f2: critic/val_f1", "'val/f2' is not one of our curves"),
        ("val/f1: critic/f1", "has none of our tags of the name map. It has: critic/val_f1"),
        ("- val/f1", "is no map of tags"),
        ("val/f1: [", "cannot be read"),
    ]:
        names.write_text(text)
        with pytest.raises(ValueError, match=message):
            compare_runs([tmp_path / "theirs"], names=names)
    with pytest.raises(ValueError, match="map its tags with --names"):
        compare_runs([tmp_path / "theirs"])
    names.write_text("val/f1: critic/val_f1")
    with pytest.raises(ValueError, match="all of these are ours"):
        compare_runs([study], names=names)


def test_bad_input_leaves_the_report_as_it_was(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    compare([study], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copytree(study / "grpo", tmp_path / "again" / "grpo")
    cases: list[tuple[list[Path], str | None, str]] = [
        ([], None, "names no folder"),
        ([empty], None, "holds no run"),
        ([tmp_path / "missing"], None, "is not a folder"),
        ([study], "gpro", "baseline 'gpro' is none of the arms: 'calibadv', 'grpo'"),
        ([study, tmp_path / "again"], None, "the same seed 0; leave one of them out"),
    ]
    for runs, baseline, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            compare(runs, out, baseline)
        assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(ValueError, match="is not a folder"):
        compare([study], out / "report.md")


def test_a_run_without_events_has_its_validations(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "runs", ignore=shutil.ignore_patterns("events*"))
    results, arms = compare_runs([tmp_path / "runs"])
    assert sum("no TensorBoard curves" in warning for warning in results["warnings"]) == 4
    assert arms[0].runs[0].curves["val/f1"] == {0: 0.5, 10: 1, 20: 1, 30: 1}


def test_a_damaged_event_file_is_named_and_a_cut_one_is_read(tmp_path: Path) -> None:
    write_curves(tmp_path, {"val/f1": {step: step / 10 for step in range(10)}})
    (path,) = tmp_path.glob("events*")
    content = path.read_bytes()
    path.write_bytes(content[:-5])  # as a killed run leaves it
    assert list(read_curves(tmp_path)["val/f1"]) == list(range(9))
    for index in (len(content) // 2, len(content) - 7):
        path.write_bytes(content[:index] + bytes([content[index] ^ 0xFF]) + content[index + 1 :])
        with pytest.raises(ValueError, match=rf"event file '{path}' is damaged after \d+ records"):
            read_curves(tmp_path)
    path.write_bytes(b"this is no event file, but it is called like one")
    with pytest.raises(ValueError, match="is damaged after 0 records"):
        read_curves(tmp_path)


def test_what_a_resumed_run_did_again_counts_once(tmp_path: Path) -> None:
    write_curves(tmp_path, {"val/f1": {1: 0.1, 2: 0.2, 3: 0.3}}, filename_suffix=".1")
    write_curves(tmp_path, {"val/f1": {2: 0.5}}, filename_suffix=".2", purge_step=2)
    assert read_curves(tmp_path)["val/f1"] == pytest.approx({1: 0.1, 2: 0.5})


def test_values_that_are_not_finite_are_left_out_and_named(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "runs")
    write_curves(tmp_path / "runs" / "grpo" / "seed0", {"update/loss": {1: 0.5, 2: float("nan"), 3: float("inf")}})
    results, arms = compare_runs([tmp_path / "runs"])
    assert results["warnings"] == ["grpo/seed0: not finite, and so not drawn: update/loss (2 steps)"]
    write_report(tmp_path / "report", results, arms)


def test_mean_and_band_over_seeds() -> None:
    found = seed_band([{0: 0.0, 1: 1.0}, {0: 0.0, 1: 2.0}, {1: 6.0}], [[0], [1]])
    # At 1: mean 3, standard deviation sqrt((4 + 1 + 9) / 2) = 2.646; 3 - 2.646 = 0.354 is below the lowest seed, 1.
    assert found.mean.tolist() == [0, 3]
    assert found.low.tolist() == [0, 1]
    assert found.high.tolist() == pytest.approx([0, 5.6458], abs=1e-4)
    assert found.seeds.shape == (3, 2)
    averaged = seed_band([{0: 0.0, 1: 1.0, 2: 5.0}], [[0, 1], [2]])
    assert (averaged.steps.tolist(), averaged.mean.tolist()) == ([0.5, 2], [0.5, 5])
    assert len(seed_band([{0: 1.0}] * 6, [[0]]).seeds) == 0


def test_long_curves_of_many_seeds_make_a_small_chart() -> None:
    steps = range(1, 1001)
    seeds = np.random.default_rng(0).random((10, 1000))
    curves = [dict(zip(steps, seed.tolist(), strict=True)) for seed in seeds]
    grid = step_windows(curves)
    assert sorted(step for window in grid for step in window) == list(steps)
    assert len(grid) <= 60
    names = [f"arm {index}" for index in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = chart_svg(Chart("val/f1", {index: seed_band(curves, grid) for index in range(8)}), names, "c0-")
    assert len(svg) < 60_000  # 60 charts are below 4 MB
    assert all(f"var(--arm-{index})" in svg and f">arm {index}<" in svg for index in range(8))
    assert "#0a0b" not in svg
    assert "#0102" not in svg


def test_meanings_come_from_the_documentation() -> None:
    assert curve_description("stability/entropy").endswith("in nats")
    assert curve_description("advantage/calibrated/answer/ratio").startswith("positive / negative mass")
    assert curve_description("rollout/invalid") == "share of rollouts with that status"  # without the link
    assert curve_description("no/such_curve") == ""


def test_packed_runs_give_the_same_tables(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from tools.run_archive import pack, unpack

    pack(study, tmp_path / "runs.parquet")
    unpack(tmp_path / "runs.parquet", tmp_path / "again")
    for name, runs in (("first", study), ("second", tmp_path / "again")):
        compare([runs], baseline="grpo", out=tmp_path / name)
    first, second = ((tmp_path / name / "report.md").read_text() for name in ("first", "second"))
    assert "| calibadv |" in first
    assert first == second
    curves = read_curves(tmp_path / "again" / "grpo" / "seed1")
    assert curves == read_curves(study / "grpo" / "seed1")
