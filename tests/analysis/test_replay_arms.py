from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.records import answer, rollout, search

from calibadv.analysis.replay import Comparison, Method, RecordedRollouts, ReplayArm, load_arms, replay
from calibadv.calibrators import AnswerRebalance, SoftPenalty
from calibadv.cli.main import main
from calibadv.estimators import GRPO
from calibadv.rewards import F1
from calibadv.runs.rollouts import rollout_to_json, write_records
from calibadv.types import Rollout, RolloutStatus

VECTORS = Path(__file__).parents[1] / "vectors" / "calibration.jsonl"

# Rewards 1, 0, 0: mean 1/3, std sqrt((4/9 + 1/9 + 1/9) / 2) = sqrt(1/3), so A = (2/3) / sqrt(1/3) = 2 H and -H, where
H = 0.57735
GOOD = rollout(search("a", "b"), answer("gold"))  # correctness 1
BAD = rollout(search("a", "x"), search("y"), answer("no", tokens=4), sample=1)  # correctness 1/2, 0
LOST = rollout(search("z"), answer("none"), sample=2)  # correctness 0
GROUP = [GOOD, BAD, LOST]
# A tied group, of which MT-GRPO makes something: one search finds evidence, the other finds nothing.
TIED = [
    rollout(search("a"), answer("gold"), question_id="tied"),
    rollout(search(), answer("gold"), question_id="tied", sample=1),
]


def write(path: Path, rollouts: list[Rollout]) -> Path:
    write_records(path, [rollout_to_json(episode) for episode in rollouts])
    return path


def results(
    capsys: pytest.CaptureFixture[str], files: list[Path], *arms: str, config: list[Path | str] | None = None
) -> dict[str, Any]:
    replay(files, arm=list(arms), config=config, json=True)
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def masses(arm: dict[str, Any], stage: str = "calibrated") -> list[float]:
    return [arm[stage][kind][f"{side}_mass"] for kind in ("search", "answer") for side in ("positive", "negative")]


def near(*values: float) -> Any:
    return pytest.approx(list(values), abs=1e-4)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return write(tmp_path / "three.jsonl", GROUP)


# --- what each method does


def test_masses_and_softened_turns(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = results(capsys, [three], "grpo", "calibadv=calibrators/calibadv")
    grpo, calibadv = content["arms"]
    # Per rollout of three. Searches: 3 tokens x 2 H; (6 + 3) x H. Answers: 2 x 2 H; (4 + 2) x H.
    assert masses(grpo) == near(2 * H, 3 * H, 4 / 3 * H, 2 * H)
    # BAD's first search has H / 2: (3 / 2 + 3 + 3) x H. Positive answers rise to the 6 H of the negative ones.
    assert masses(calibadv) == near(2 * H, 2.5 * H, 2 * H, 2 * H)
    assert masses(calibadv, "estimated") == masses(grpo, "estimated") == masses(grpo)
    assert calibadv["calibrated"]["search"]["ratio"] == pytest.approx(0.8, abs=1e-4)
    assert [(arm["punished_turns"], arm["softened_turns"]) for arm in (grpo, calibadv)] == [(3, 0), (3, 1)]
    assert (calibadv["reward"], calibadv["estimator"]) == ("F1", "GRPO")
    assert calibadv["calibrators"] == ["SoftPenalty", "AnswerRebalance"]


def test_a_side_without_mass_has_no_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (arm,) = results(capsys, [write(tmp_path / "tied.jsonl", TIED)], "grpo")["arms"]
    assert arm["calibrated"]["answer"] == {"positive_mass": 0.0, "negative_mass": 0.0, "ratio": None}


def test_tied_and_zeroed_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = results(capsys, [write(tmp_path / "in.jsonl", GROUP + TIED)], "grpo", "mt=estimators/mt_grpo")
    assert content["groups"] == 2
    assert [(arm["tied_groups"], arm["zeroed_groups"]) for arm in content["arms"]] == [(1, 1), (1, 0)]


def test_rollouts_that_are_not_trained_are_in_no_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = [
        rollout(search("a"), [search("b")[0]], question_id="failed", sample=n, status=RolloutStatus.SEARCH_FAILED)
        for n in range(2)
    ]
    content = results(capsys, [write(tmp_path / "in.jsonl", GROUP + failed)], "grpo", "rloo=estimators/rloo")
    assert (content["rollouts"], content["trained_rollouts"], content["groups"]) == (5, 3, 1)
    # Masses are per rollout of the batch, as the curves are.
    assert masses(content["arms"][0]) == near(*(3 / 5 * H * x for x in (2, 3, 4 / 3, 2)))


def test_figures_of_the_published_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    content = results(capsys, [VECTORS], "grpo", "calibadv=calibrators/calibadv")
    sums: dict[str, float] = dict.fromkeys(("search+", "search-", "answer+", "answer-", "difference", "softened"), 0.0)
    lines = [json.loads(line) for line in VECTORS.read_text("utf-8").splitlines()]
    for line in lines:
        tokens = [segment["num_tokens"] for segment in line["segments"] if segment["source"] == "policy"]
        expected = line["expected"]["advantages"]
        for turn, (n, before, after) in enumerate(zip(tokens, expected["grpo"], expected["calibadv"], strict=True)):
            kind = "answer" if turn == len(tokens) - 1 else "search"
            sums[f"{kind}{'+' if after > 0 else '-'}"] += n * abs(after)
            sums["difference"] += n * abs(after - before)
            sums["softened"] += kind == "search" and before < 0 and after > before + 1e-6
    assert masses(content["arms"][1]) == pytest.approx([n / len(lines) for n in list(sums.values())[:4]], rel=1e-5)
    assert content["arms"][1]["softened_turns"] == sums["softened"]
    (disagreement,) = content["disagreements"]
    assert disagreement["mass"] == pytest.approx(sums["difference"] / len(lines), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.permutations(GROUP + TIED))
def test_the_order_of_rollouts_does_not_matter(rollouts: list[Rollout]) -> None:
    arms = [
        ReplayArm("grpo", Method(F1(), GRPO(), [])),
        ReplayArm("calibadv", Method(F1(), GRPO(), [SoftPenalty(), AnswerRebalance()])),
    ]
    found = []
    for episodes in (GROUP + TIED, rollouts):
        recorded = RecordedRollouts([Path("f")] * len(episodes), [{}] * len(episodes), list(episodes))
        comparison = Comparison(["grpo", "calibadv"], recorded)
        (rows,) = recorded.batches()
        comparison.add(rows, {arm.name: arm.apply([recorded.rollouts[row] for row in rows]) for arm in arms})
        found.append(comparison.results(top=2))
    assert found[0].arms[1].softened_turns == found[1].arms[1].softened_turns
    assert [(turn.sample, turn.turn) for turn in found[0].disagreements[0].turns] == [
        (turn.sample, turn.turn) for turn in found[1].disagreements[0].turns
    ]
    assert found[0].disagreements[0].mass == pytest.approx(found[1].disagreements[0].mass)


# --- where methods differ


def test_the_turns_that_differ_most(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = results(capsys, [three], "grpo", "calibadv=calibrators/calibadv")["disagreements"]
    assert (found["arms"], found["scale"]) == (["grpo", "calibadv"], 1.0)
    # GOOD's answer: 2 tokens x |2 H - 3 H|; BAD's first search: 3 tokens x |-H + H / 2|; the other turns are the same.
    first, second = found["turns"]
    assert (first["sample"], first["turn"], first["kind"], first["tokens"]) == (0, 1, "answer", 2)
    assert [*first["advantages"], first["difference"]] == near(2 * H, 3 * H, 2 * H)
    assert (second["sample"], second["turn"], second["kind"]) == (1, 0, "search")
    assert [*second["advantages"], second["difference"]] == near(-H, -H / 2, 1.5 * H)
    assert (second["question_id"], second["question"], second["step"]) == ("q", "what?", 0)
    assert (second["file"], second["text"]) == (str(three), BAD.segments[0].text)
    assert found["mass"] == pytest.approx(3.5 / 3 * H, abs=1e-4)


def test_an_estimator_with_larger_numbers_is_not_another_method(
    three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = results(capsys, [three], "grpo", "rloo=estimators/rloo")["disagreements"]
    # RLOO: 1 - 0 and 0 - 1/2, against 2 H and -H: the same up to a factor of 2 H.
    assert found["scale"] == pytest.approx(2 * H, abs=1e-4)
    assert (found["mass"], found["turns"]) == (0.0, [])


def test_estimators_are_compared_at_one_scale(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = results(capsys, [three], "grpo", "mt=estimators/mt_grpo")["disagreements"]
    # MT-GRPO adds 1, 0 and -1 to the first searches (correctness 1, 1/2, 0), and 0 to BAD's second, which has no peer.
    grpo = 3 * 2 * H + (6 + 3) * H + 2 * 2 * H + (4 + 2) * H
    scale = grpo / (3 * (2 * H + 1) + 6 * H + 3 * (H + 1) + 10 * H)
    assert found["scale"] == pytest.approx(scale, abs=1e-4)
    most = found["turns"][0]
    assert (most["sample"], most["turn"]) == (2, 0)
    assert [*most["advantages"], most["difference"]] == near(-H, -H - 1, 3 * (scale * (H + 1) - H))


def test_top_bounds_the_turns_and_every_arm_is_compared_with_the_first(
    three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["a=calibrators/calibadv", "b", "c=calibrators/soft_penalty"]
    replay([three], arm=arms, top=1, json=True)
    content = json.loads(capsys.readouterr().out)
    assert [found["arms"] for found in content["disagreements"]] == [["a", "b"], ["a", "c"]]
    assert [len(found["turns"]) for found in content["disagreements"]] == [1, 1]
    replay([three], arm=arms, top=0)
    assert "most on" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"top is -1; it must be at least 0"):
        replay([three], arm=arms, top=-1)


# --- arms and their settings


def test_config_holds_for_all_arms_and_comes_before_their_overlays(tmp_path: Path) -> None:
    common, cover = tmp_path / "common.yaml", tmp_path / "cover.yaml"
    common.write_text("model: {reward: ExactMatch, estimator: calibadv.estimators.RLOO}\n", encoding="utf-8")
    cover.write_text("model: {reward: CoverMatch}\n", encoding="utf-8")
    methods = [arm.method for arm in load_arms(["plain", f"own={cover}+calibrators/soft_penalty"], [str(common)])]
    assert [type(method.reward).__name__ for method in methods] == ["ExactMatch", "CoverMatch"]
    assert [type(method.estimator).__name__ for method in methods] == ["RLOO", "RLOO"]
    assert [len(method.calibrators) for method in methods] == [0, 1]


def test_settings_that_decide_no_advantages_are_named(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["grpo", "llds=regularizers/llds", "dr=estimators/dr_grpo+losses/dr_grpo", "soft=calibrators/soft_penalty"]
    content = results(capsys, [three], *arms)
    assert [arm["without_effect"] for arm in content["arms"]] == [[], ["model.regularizers"], ["model.loss"], []]
    replay([three], arm=arms)
    out = " ".join(capsys.readouterr().out.split())
    assert "llds: no effect on the advantages of given rollouts: model.regularizers" in out
    assert "llds gives the same advantages as grpo" in out


@pytest.mark.parametrize(
    ("arm", "problem"),
    [
        ("igpo=estimators/igpo", r"arm 'igpo': IGPO needs the policy's probability .*; train with it"),
        ("both=estimators/mt_grpo+calibrators/calibadv", r"arm 'both': MTGRPO already gives credit .* count it twice"),
        ("two=calibrators/calibadv+calibrators/soft_penalty", r"arm 'two': .* each install an AdvantageCalibration"),
        ("none=calibrators/none", r"arm 'none': config 'calibrators/none' is neither a file nor a packaged config"),
        ("a b", r"arm 'a b': a name has letters, digits"),
        ("GRPO", r"duplicate arm 'GRPO'; arm names must be unique"),
    ],
)
def test_arms_that_cannot_be_replayed(three: Path, tmp_path: Path, arm: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        replay([three], tmp_path / "out", arm=["grpo", arm])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- files


def test_each_arm_writes_a_file_of_its_name(three: Path, tmp_path: Path) -> None:
    replay([three], tmp_path / "out", arm=["grpo", "calibadv=calibrators/calibadv"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"grpo.jsonl", "calibadv.jsonl"}
    for name, config in (("grpo", []), ("calibadv", ["calibrators/calibadv"])):
        replay([three], tmp_path / "alone.jsonl", config)
        assert (tmp_path / "out" / f"{name}.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_a_step_of_each_file_is_a_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / "one.jsonl", GROUP), write(tmp_path / "other.jsonl", GROUP)]
    content = results(capsys, [*files, files[0]], "grpo")  # a file that is given twice is read once
    assert (content["files"], content["batches"], content["groups"]) == ([str(file) for file in files], 2, 2)
    assert masses(content["arms"][0]) == near(2 * H, 3 * H, 4 / 3 * H, 2 * H)
    with pytest.raises(ValueError, match=r"one.jsonl' and '.*other.jsonl' both hold step 0, .*; replay them one at a"):
        replay(files, tmp_path / "out", arm=["grpo"])
    assert not (tmp_path / "out").exists()


def test_a_run_folder_stands_for_its_training_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 1):
        later = [rollout(search("a"), answer(text), step=step, sample=n) for n, text in enumerate(("gold", "no"))]
        write(tmp_path / "rollouts" / f"train-step-{step:06d}.jsonl", later)
    write(tmp_path / "rollouts" / "val-step-000001.jsonl", GROUP)
    assert results(capsys, [tmp_path], "grpo")["batches"] == 2
    replay([tmp_path], tmp_path / "out", arm=["grpo"])
    lines = (tmp_path / "out" / "grpo.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2, 2]
    with pytest.raises(ValueError, match=r"folder '.*out' holds no train-step-\*.jsonl; give rollout files"):
        replay([tmp_path / "out"], arm=["grpo"])


def test_the_folder_of_a_study_stands_for_those_of_all_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        write(tmp_path / "grpo" / f"seed{seed}" / "rollouts" / "train-step-000001.jsonl", GROUP)
    assert results(capsys, [tmp_path], "grpo")["groups"] == 2


def test_groups_of_a_single_rollout_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "val.jsonl", [*GROUP, rollout(search("a"), answer("gold"), step=1)])
    assert results(capsys, [file], "grpo")["lone_groups"] == 1
    replay([file], arm=["grpo"])
    assert "warning: 1 group of a single rollout, as in files of validation" in capsys.readouterr().out


def test_the_rollouts_that_are_replayed_stay(three: Path, tmp_path: Path) -> None:
    before = three.read_bytes()
    with pytest.raises(ValueError, match=r"three.jsonl' is one of the rollout files, which it would replace; give"):
        replay([three], three.parent / "." / three.name)
    with pytest.raises(ValueError, match=r"three.jsonl' is one of the rollout files, which it would replace; give"):
        replay([three], three.parent, arm=["grpo", "three=calibrators/calibadv"])
    assert three.read_bytes() == before


def test_with_arms_out_is_a_folder(three: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out '.*three.jsonl' is a file, and with --arm it must be a folder"):
        replay([three], three, arm=["grpo"])
    assert len(three.read_text("utf-8").splitlines()) == 3


# --- the command line


@pytest.mark.parametrize(
    "words",
    ["--arm grpo --arm calibadv=calibrators/calibadv", "--arm grpo calibadv=calibrators/calibadv"],
)
def test_the_table(words: str, three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(three), *words.split()]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "3 rollouts in 1 group, 1 step of 1 file"
    # H x (2, 3, 4/3, 2), then H x (2, 2.5, 2, 2)
    assert "grpo 1.15 1.73 0.77 1.15 0 0 0" in lines
    assert "calibadv 1.15 1.44 1.15 1.15 1 (33%) 0 0 0.67" in lines
    assert "calibadv differs from grpo most on" in lines
    assert "+1.15 +1.73 2 1.15 step 0, q, sample 0, answer" in lines
    assert "-0.58 -0.29 3 0.87 step 0, q, sample 1, search 1" in lines


def test_without_arms_the_method_is_that_of_config(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(three), "--config", "calibrators/soft_penalty", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [arm["name"] for arm in content["arms"]] == ["calibrators/soft_penalty"]
    assert content["disagreements"] == []


def test_what_a_program_reads_is_json_alone(three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(three), "--arm=grpo", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rollouts"] == 3
    assert (tmp_path / "out" / "grpo.jsonl").exists()


def test_texts_of_rollouts_do_not_reach_the_terminal_as_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    wild = rollout(search("z"), answer("\x1b[2Jnone [red]:smile:[/red]\ud800"), sample=2)
    replay([write(tmp_path / "wild.jsonl", [GOOD, BAD, wild])], arm=["grpo", "mt=estimators/mt_grpo"], top=9)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "<answer> [2Jnone [red]:smile:[/red] </answer>" in out
