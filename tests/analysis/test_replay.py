from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.records import answer, rollout, search

from calibadv.analysis.replay import load_method, replay
from calibadv.calibrators import AnswerRebalance, SoftPenalty
from calibadv.config.files import config_name, configs_folder, read_config, resolve_config
from calibadv.config.overlays import check_overlay_order
from calibadv.estimators import GRPO
from calibadv.rewards import F1, ExactMatch
from calibadv.runs.rollouts import Record, rollout_to_json, write_records
from calibadv.types import Rollout, RolloutStatus

GOOD = rollout(search("a", "b"), answer("gold", tokens=2))
BAD = rollout(search("a", "x"), search("y"), answer("no", tokens=4), sample=1)
A = 0.7071058  # of rewards 1 and 0


def run(folder: Path, records: list[Record], *config: str | Path) -> list[dict[str, Any]]:
    write_records(folder / "in.jsonl", records)
    replay([folder / "in.jsonl"], folder / "out.jsonl", list(config))
    return [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def bare(episode: Rollout, **more: Any) -> Record:
    """A record without anything computed."""
    computed = ("status", "format_valid", "score", "answer_score", "step_correctness", "advantages")
    return {key: value for key, value in rollout_to_json(episode).items() if key not in computed} | more


def advantages(line: dict[str, Any]) -> tuple[Any, Any]:
    return line["advantages"]["estimated"], line["advantages"]["calibrated"]


def overlay(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_without_overlays_the_method_is_grpo_with_f1(tmp_path: Path) -> None:
    good, bad = run(tmp_path, [bare(GOOD), bare(BAD)])
    assert (good["format_valid"], good["score"], good["step_correctness"]) == (True, 1.0, [1.0])
    assert (bad["format_valid"], bad["score"], bad["step_correctness"]) == (True, 0.0, [0.5, 0.0])
    assert advantages(good) == (pytest.approx([A, A]), pytest.approx([A, A]))
    assert advantages(bad) == (pytest.approx([-A] * 3), pytest.approx([-A] * 3))


def test_with_calibadv(tmp_path: Path) -> None:
    good, bad = run(tmp_path, [bare(GOOD), bare(BAD)], "calibrators/calibadv")
    # BAD's first search found a of {a, x}; answers weigh +2 A and -4 A
    assert advantages(good) == (pytest.approx([A, A]), pytest.approx([A, 2 * A]))
    assert advantages(bad) == (pytest.approx([-A] * 3), pytest.approx([-A / 2, -A, -A]))


def test_order_and_unknown_keys_are_kept(tmp_path: Path) -> None:
    other = rollout(search("c"), answer("gold"), question_id="other")
    records = [bare(BAD, note="first"), bare(other), bare(GOOD, note={"deep": [1, None]})]
    lines = run(tmp_path, records)
    assert [list(line)[: len(given)] for line, given in zip(lines, records, strict=True)] == [list(r) for r in records]
    assert [{key: line[key] for key in given} for line, given in zip(lines, records, strict=True)] == records
    assert lines[0]["advantages"]["estimated"] == pytest.approx([-A] * 3)  # its group is the third line


def test_computed_values_are_brought_up_to_date(tmp_path: Path) -> None:
    stale = {"score": 0.3, "answer_score": 0.3, "status": "invalid", "format_valid": False}
    stale |= {"step_correctness": [], "advantages": None}
    (line,) = run(tmp_path, [bare(GOOD, **stale)])
    assert (line["score"], line["answer_score"], line["status"], line["format_valid"]) == (1.0, 1.0, "answered", True)


def test_what_is_not_recorded_is_not_added(tmp_path: Path) -> None:
    (line,) = run(tmp_path, [bare(GOOD)])
    assert {"status", "answer_score"}.isdisjoint(line)


def test_each_step_is_a_batch_of_its_own(tmp_path: Path) -> None:
    later = rollout(search("a"), answer("gold"), sample=1, step=1)
    lines = run(tmp_path, [bare(GOOD), bare(later), bare(BAD)])
    assert lines[0]["advantages"]["estimated"] == pytest.approx([A, A])
    assert lines[1]["advantages"]["estimated"] == pytest.approx([1.0, 1.0], abs=1e-5)  # alone in its group


def test_failed_searches_have_no_advantages(tmp_path: Path) -> None:
    failed = rollout(search("a"), [search("b")[0]], status=RolloutStatus.SEARCH_FAILED, sample=2)
    lines = run(tmp_path, [bare(GOOD), bare(failed, status="search_failed"), bare(BAD)], "calibrators/calibadv")
    assert advantages(lines[1]) == (None, None)
    assert (lines[1]["score"], lines[1]["format_valid"], lines[1]["step_correctness"]) == (0.0, False, [0.0])
    assert lines[0]["advantages"]["estimated"] == pytest.approx([A, A])


def test_an_overlay_may_change_the_reward(tmp_path: Path) -> None:
    exact = overlay(tmp_path / "exact.yaml", "model: {reward: calibadv.rewards.ExactMatch, policy: nowhere}\n")
    near = rollout(search("a"), answer("gold ring"))
    assert run(tmp_path, [bare(near)])[0]["score"] == pytest.approx(2 / 3)
    assert run(tmp_path, [bare(near)], exact)[0]["score"] == 0.0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty; it needs at least one rollout"),
        ('{"question_id": "q"}\n', "line 1: prepend_think is missing"),
        ('\n{"score": NaN}', "line 2: score is nan; write a finite number, or null where there is none"),
        ('{"advantages": {"estimated": [0.5, -Infinity]}}', r"line 1: advantages\.estimated\[1\] is -inf; write a"),
        ('{"metadata": {"logprob": 1e999}}', r"line 1: metadata\.logprob is inf; write a finite number"),
    ],
)
def test_bad_input_leaves_the_output_as_it_was(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "in.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "out.jsonl").write_text("old", encoding="utf-8")
    with pytest.raises(ValueError, match=problem):
        replay([tmp_path / "in.jsonl"], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "old"


# --- config names


def test_packaged_configs_have_names_and_others_have_paths(tmp_path: Path) -> None:
    packaged = resolve_config("calibrators/calibadv")
    assert packaged == configs_folder() / "calibrators" / "calibadv.yaml"
    assert config_name(packaged) == "calibrators/calibadv"
    own = overlay(tmp_path / "own.yaml", "{}")
    assert resolve_config(str(own)) == own
    assert config_name(own) == str(own)


def test_an_unknown_config_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"config 'mine' is neither .* ones are base, .*calibrators/calibadv, .*quick"):
        resolve_config("mine")
    for name, meant in (("calibadv", "calibadv"), ("calibrators/soft", "soft_penalty")):
        with pytest.raises(ValueError, match=rf"did you mean calibrators/{meant}\?$"):
            resolve_config(name)


@pytest.mark.parametrize("text", ["a: [", "- a\n- b\n", "\tb"])
def test_a_config_that_is_no_mapping_is_an_error_of_one_line(tmp_path: Path, text: str) -> None:
    path = overlay(tmp_path / "own.yaml", text)
    with pytest.raises(ValueError, match=r"config '.*own\.yaml'") as caught:
        check_overlay_order([read_config(path)])
    assert "\n" not in str(caught.value)


# --- the order of overlays


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    texts = {
        "base": "trainer: {callbacks: []}\nmodel: {reward: {class_path: F1}, group_size: 6}\n",
        "soft": "trainer:\n  callbacks+:\n  - {class_path: calibadv.callbacks.AdvantageCalibration, init_args: {}}\n",
        "dotted": "trainer.callbacks+: [calibadv.callbacks.AdvantageCalibration]\n",
        "soft_and_more": "trainer: {callbacks+: [Timer]}\nmodel: {group_size: 3, policy: here}\n",
        "size": "model: {group_size: 3}\n",
        "whole": "model:\n",
        "corpus": "model: {retriever: {init_args: {corpus: mine.jsonl}}}\n",
        "dense": "model: {retriever: {class_path: calibadv.retrieval.Dense, init_args: {encoder: minilm}}}\n",
        "dual": "model: {loss: {init_args: {dual_clip: 3.0}}}\n",
        "short_dual": "model: {loss: {dual_clip: 3.0}}\n",
        "ppo": "model: {loss: {class_path: PPOClip, init_args: {clip_high: 0.3}}}\n",
        "cispo": "model: {loss: {class_path: calibadv.losses.CISPO}}\n",
        "empty": "",
        "reset": "trainer: {callbacks: [AdvantageCalibration]}\n",
        "doubled": "trainer: {callbacks: [AdvantageCalibration, {class_path: AdvantageCalibration}]}\n",
    }
    return {name: overlay(tmp_path / f"{name}.yaml", text) for name, text in texts.items()}


@pytest.mark.parametrize(
    "order",
    [
        [],
        ["base"],
        ["base", "soft"],
        ["base", "size", "soft"],
        ["soft", "size"],
        ["empty", "base", "empty"],
        ["base", "soft", "soft_and_more"],
        ["corpus", "dense"],  # which takes a corpus too
        ["dual", "ppo"],
    ],
)
def test_orders_that_keep_everything_are_accepted(files: dict[str, Path], order: list[str]) -> None:
    check_overlay_order([read_config(files[name]) for name in order])


@pytest.mark.parametrize(
    ("order", "lost", "owner"),
    [
        (["soft", "base"], "soft", "base"),
        (["dotted", "base"], "dotted", "base"),
        (["size", "base"], "size", "base"),
        (["size", "base", "soft"], "size", "base"),
        (["size", "whole"], "size", "whole"),
        (["base", "base"], "base", "base"),
        (["base", "soft", "reset"], "soft", "reset"),
        (["dual", "cispo"], "dual", "cispo"),
        (["short_dual", "cispo"], "short_dual", "cispo"),
    ],
)
def test_an_overlay_of_which_nothing_remains_is_refused(
    files: dict[str, Path], order: list[str], lost: str, owner: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"'.*/{lost}\.yaml' has no effect: .*; leave it out, or put it after '.*/{owner}\.yaml'"
    ):
        check_overlay_order([read_config(files[name]) for name in order])


def test_an_appended_list_that_is_lost_is_refused_even_if_the_rest_remains(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"appends to trainer.callbacks is lost: .*base\.yaml' sets the whole list"):
        check_overlay_order([read_config(files["soft_and_more"]), read_config(files["base"])])


@pytest.mark.parametrize(
    "order", [["base", "soft", "dotted"], ["base", "soft", "soft"], ["reset", "soft"], ["doubled"]]
)
def test_two_calibration_callbacks_are_refused(files: dict[str, Path], order: list[str]) -> None:
    with pytest.raises(ValueError, match="each install an AdvantageCalibration; give one overlay that lists all"):
        check_overlay_order([read_config(files[name]) for name in order])


def test_replay_refuses_the_same_orders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'calibrators/soft_penalty' and 'calibrators/calibadv' each install"):
        run(tmp_path, [bare(GOOD)], "calibrators/soft_penalty", "calibrators/calibadv")
    assert not (tmp_path / "out.jsonl").exists()


# --- the method of merged configs


def test_the_method_of_the_base_and_an_overlay() -> None:
    base = configs_folder() / "base.yaml"
    plain = load_method([base])
    assert (type(plain.reward), type(plain.estimator), list(plain.calibrators)) == (F1, GRPO, [])
    calibrated = load_method([base, resolve_config("calibrators/calibadv_lambda_1_5")])
    soft, rebalance = calibrated.calibrators
    assert isinstance(soft, SoftPenalty)
    assert isinstance(rebalance, AnswerRebalance)
    assert rebalance.target_ratio == 1.5


def test_later_files_win_and_lists_are_reset(tmp_path: Path) -> None:
    install = "class_path: AdvantageCalibration, init_args: {calibrators: [AnswerRebalance]}"
    first = overlay(
        tmp_path / "first.yaml", "trainer: {callbacks+: [AdvantageCalibration]}\nmodel.reward: CoverMatch\n"
    )
    second = overlay(
        tmp_path / "second.yaml", f"trainer: {{callbacks: [{{{install}}}]}}\nmodel: {{reward: ExactMatch}}\n"
    )
    method = load_method([configs_folder() / "base.yaml", first, second])
    assert isinstance(method.reward, ExactMatch)
    assert [type(calibrator) for calibrator in method.calibrators] == [AnswerRebalance]


def test_other_callbacks_and_keys_are_not_instantiated(tmp_path: Path) -> None:
    other = overlay(
        tmp_path / "other.yaml", "trainer: {callbacks: [nowhere.Callback], devices: 99}\ndata: {train: none}\n"
    )
    assert list(load_method([configs_folder() / "base.yaml", other]).calibrators) == []
