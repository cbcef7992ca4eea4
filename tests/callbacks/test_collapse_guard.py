from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from support.fits import curves, fit, results
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from calibadv.callbacks import CollapseGuard
from calibadv.callbacks._collapse.detector import Alarm, Watch
from calibadv.callbacks._collapse.rules import Limits
from calibadv.cli.main import main
from calibadv.runs.folder import RunFolder
from calibadv.runs.rollouts import read_rollouts
from calibadv.runs.summary import summarize_run

RECORDED = Path(__file__).parents[1] / "recorded"
# A checkpoint after every step.
EVERY = ("--checkpoint.every_n_rollout_steps", "1", "--checkpoint.keep", "0", "--trainer.val_check_interval", "100")
# Alarms at once, and none of what two groups of two rollouts do all the time.
GUARD = (
    *("--trainer.callbacks+=CollapseGuard", "--trainer.callbacks.limits.patience=1"),
    *("--trainer.callbacks.limits.tied_groups=1", "--trainer.callbacks.limits.turns_factor=9"),
)


def recorded(name: str) -> list[tuple[int, dict[str, float]]]:
    """The curves of a run, as the guard meets them: each training step, then the validation that follows it."""
    columns = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))["curves"]
    by_step = {tag: dict(enumerate(values, 1)) for tag, values in columns.items() if isinstance(values, list)}
    val = {tag: {int(step): value for step, value in v.items()} for tag, v in columns.items() if isinstance(v, dict)}
    rows = []
    for step in range(101):
        for part in (by_step, val):
            row = {tag: values[step] for tag, values in part.items() if step in values}
            rows += [(step, row)] if row else []
    return rows


def alarms(rows: list[tuple[int, dict[str, float]]], **limits: float) -> list[Alarm]:
    watch = Watch(Limits(**limits))  # type: ignore[arg-type]
    return [alarm for step, row in rows for alarm in watch.observe(row, step)]


def steps(curve: str, values: list[float], **limits: float) -> list[int]:
    """The steps, from 1, at which a curve that stands alone raises an alarm."""
    return [alarm.step for alarm in alarms([(k, {curve: v}) for k, v in enumerate(values, 1)], **limits)]


def test_a_recorded_collapse_is_noticed() -> None:
    found = alarms(recorded("collapsed"))
    assert [(a.curve, a.step, a.healthy_until) for a in found[:2]] == [("stability/kl_old", 29, 26), ("val/f1", 30, 20)]
    # F1 fell from 0.82 to 0.32 within ten steps: 0.3 below what is allowed.
    assert (found[1].value, found[1].limit) == (0.32, pytest.approx(0.62))
    assert [a.curve for a in found].count("val/f1") == 1  # it stays down, and that is said once


def test_a_recorded_healthy_run_raises_no_alarm() -> None:
    rows = recorded("healthy")
    assert max(row.get("stability/kl_old", 0.0) for _, row in rows) > 8000  # although a single token ran away
    assert alarms(rows) == []


def test_without_patience_the_same_run_would_raise_alarms() -> None:
    assert {alarm.curve for alarm in alarms(recorded("healthy"), patience=1)} == {"stability/kl_old"}


@pytest.mark.parametrize("name", ["collapsed", "healthy"])
def test_the_score_falls_where_the_tables_say_so(name: str) -> None:
    rows = recorded(name)
    validations = [
        {"step": step, **{tag.removeprefix("val/"): v for tag, v in row.items()}}
        for step, row in rows
        if "val/f1" in row
    ]
    found = [alarm.step for alarm in alarms(rows) if alarm.curve == "val/f1"]
    assert found == ([30] if name == "collapsed" else [])
    assert summarize_run(validations)["step_of_collapse"] == (found[0] if found else None)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12))
def test_a_fall_is_a_fall_for_the_guard_and_for_the_tables(twentieths: list[int]) -> None:
    scores = [value / 20 for value in twentieths]  # many lie exactly 0.2 below the best
    watch = Watch(Limits())
    for step in range(len(scores)):
        watch.observe({"val/f1": scores[step]}, step)
        rows = [{"step": k, "f1": v, "format_valid": 1.0} for k, v in enumerate(scores[: step + 1])]
        is_down = summarize_run(rows)["step_of_collapse"] is not None
        assert (watch.healthy_until(step) < step) == is_down


def test_a_curve_speaks_once_until_it_has_recovered() -> None:
    down, up = [0.4], [0.9]
    # Three in a row are needed to speak, and three within the limit before it speaks again.
    assert steps("reward/format_valid", up + down * 6 + up * 2 + down * 4) == [4]
    assert steps("reward/format_valid", up + down * 6 + up * 3 + down * 4) == [4, 13]


def test_two_steps_beyond_a_limit_are_none() -> None:
    assert steps("stability/garbled", [0.0, 0.5, 0.5] * 5) == []


def test_a_policy_that_never_kept_the_format_has_not_lost_it() -> None:
    assert steps("reward/format_valid", [0.1, 0.2, 0.1, 0.3] * 3 + [0.6] + [0.2] * 3) == [16]


def test_the_kl_must_pass_both_its_median_and_its_floor() -> None:
    usual = [0.001] * 12
    assert steps("stability/kl_old", [*usual, 0.04, 0.04, 0.04]) == []  # 40 times the median, and still small
    assert steps("stability/kl_old", [*usual, 0.06, 0.06, 0.06]) == [15]
    assert steps("stability/kl_old", [0.01] * 12 + [0.15] * 3) == []  # three times the floor, and 15 times the median
    assert steps("stability/kl_old", [9.0] * 5 + [0.001] * 6) == []  # nothing is usual yet


def test_turns_may_drift_but_not_jump_either_way() -> None:
    assert steps("rollout/turns", [2 + 0.05 * k for k in range(60)]) == []  # from 2 to 5
    assert steps("rollout/turns", [3.0] * 12 + [1.9] * 3) == [15]  # below 3 / 1.5
    assert steps("rollout/turns", [3.0] * 12 + [4.6] * 3) == [15]  # above 3 * 1.5
    assert steps("rollout/turns", [3.0] * 12 + [2.1, 4.4] * 3) == []


def test_text_that_turns_into_noise_is_noticed() -> None:
    assert steps("stability/perplexity", [1.2] * 12 + [3.7] * 3) == [15]  # 3 * 1.2 = 3.6
    assert steps("stability/entropy", [0.1] * 12 + [0.9] * 3) == []  # nine times the median, below one nat
    assert steps("stability/entropy", [0.1] * 12 + [1.1] * 3) == [15]
    assert steps("stability/garbled", [0.0, 0.2, 0.2, 0.2]) == [4]


def test_what_is_not_a_number_is_beyond_every_limit() -> None:
    assert steps("stability/kl_old", [0.001] * 12 + [math.nan] * 3) == [15]


@pytest.mark.parametrize(("score", "expected"), [(0.1, [3]), (0.9, [])])
def test_ties_count_where_rollouts_fail(score: float, expected: list[int]) -> None:
    rows = [(k, {"credit/tied_groups": 1.0, "reward/score": score}) for k in range(1, 8)]
    assert [alarm.step for alarm in alarms(rows)] == expected


def test_a_start_without_silver_documents_is_told_once_and_not_acted_on() -> None:
    rows = [(k, {"credit/empty_silver": 0.7 if k % 2 else 0.4}) for k in range(1, 60)]  # 0.55 on average
    (told,) = alarms(rows)
    assert (told.step, told.acts, told.value) == (20, False, pytest.approx(0.55))
    assert alarms([(k, {"credit/empty_silver": 0.45}) for k in range(1, 60)]) == []


def test_the_last_healthy_policy_is_the_one_before_the_excursion() -> None:
    rows = [(k, {"reward/format_valid": 0.9 if k <= 7 else 0.1}) for k in range(1, 11)]
    (alarm,) = alarms(rows)
    # Rollouts of step 7 were fine, and those are of the policy after six steps.
    assert (alarm.step, alarm.healthy_until) == (10, 6)


def test_a_resumed_watch_says_what_an_uninterrupted_one_says() -> None:
    rows = recorded("collapsed")
    whole = alarms(rows)
    for cut in (28, 34, 60):
        first, second = Watch(Limits()), Watch(Limits())
        for step, row in rows[:cut]:
            first.observe(row, step)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        later = [alarm for step, row in rows[cut:] for alarm in second.observe(row, step)]
        assert later == whole[len(whole) - len(later) :]
        assert len(later) == len([a for a in whole if a.step >= rows[cut][0]])


def test_an_alarm_names_curve_value_and_limit() -> None:
    text = str(alarms(recorded("collapsed"))[1])
    assert text == "val/f1 is 0.32, below its limit 0.62 (its best so far less 0.2)"


def test_a_limit_that_is_met_exactly_is_said_as_it_is() -> None:
    rows = [(0, {"val/f1": 0.55}), (10, {"val/f1": 0.35})]
    (alarm,) = alarms(rows)
    assert alarm.limit == 0.35  # and not 0.3500000010000001
    assert str(alarm) == "val/f1 is 0.35, at its limit 0.35 (its best so far less 0.2)"


def test_senseless_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"limits.tied_groups is 1.2; it must be at least 0 and at most 1"):
        Limits(tied_groups=1.2)
    with pytest.raises(ValueError, match=r"limits.patience is 0; it must be at least 1"):
        Limits(patience=0)
    with pytest.raises(ValueError, match=r"rate_factor is 1.0; it must be above 0 and below 1"):
        CollapseGuard(rate_factor=1.0)
    with pytest.raises(ValueError, match="max_rollbacks is 0; it must be at least 1"):
        CollapseGuard(max_rollbacks=0)


def test_a_rollback_needs_its_checkpoint_to_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A validation every ten steps tells of a collapse nine steps late, when nine later checkpoints may be there.
    words = (GUARD[0], "--trainer.callbacks.action=rollback", "--checkpoint.every_n_rollout_steps", "1")
    assert fit(tmp_path, "run", *words) == 2
    assert "checkpoint.keep is 2" in (error := capsys.readouterr().err)
    assert "set it to at least 10, or 0 to keep all" in error
    assert not (tmp_path / "run").exists()


def test_a_rollback_is_for_one_process() -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    message = "action is rollback, which begins again in the same process, and there are 2 processes"
    with pytest.raises(ValueError, match=message):
        CollapseGuard("rollback").setup(trainer, None, "fit")
    CollapseGuard("stop").setup(trainer, None, "fit")


class Breaks(Callback):
    """Make noise of the policy before a step, if it learns too fast.

    Args:
        step: the rollout step.
        rate: the learning rate that the policy can bear.
    """

    def __init__(self, step: int, rate: float) -> None:
        self.step = step
        self.rate = rate

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.rollout_step + 1 == self.step and pl_module.lr_factor * pl_module.learning_rate > self.rate:
            with torch.no_grad():
                for parameter in pl_module.model.parameters():
                    parameter.zero_()
            pl_module.agent.engine.sync(pl_module.policy)


BREAKS = (f"--trainer.callbacks+={__name__}.Breaks", "--trainer.callbacks.step=4")
ROLLBACK = (*BREAKS, "--trainer.callbacks.rate=2e-4", *GUARD, "--trainer.callbacks.action=rollback", *EVERY)


def texts(folder: Path) -> list[tuple[int, str]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [
        (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors("guard/why/text_summary")
    ]


def test_a_run_that_breaks_is_stopped_with_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        *BREAKS,
        "--trainer.callbacks.rate=0",
        *GUARD,
        "--trainer.callbacks.action=stop",
        "--model.rollout_steps=9",
    )
    with caplog.at_level(logging.WARNING, "calibadv"):
        assert fit(tmp_path, "run", *words, "--checkpoint.every_n_rollout_steps", "5") == 0
    *_, stopped, command = capsys.readouterr().out.splitlines()
    assert stopped == "stopped by its guard after rollout step 4 of 9; to continue:"
    assert command.endswith("--run.name run --ckpt_path last")
    folder = RunFolder(tmp_path / "run")
    (line,) = [record.getMessage() for record in caplog.records if "CollapseGuard" in record.getMessage()]
    assert line == (
        "CollapseGuard: rollout step 4: reward/format_valid is 0, below its limit 0.5 (above which it has been), "
        "and stability/garbled is 1, above its limit 0.1 (rollouts with noise in them); stopping"
    )
    assert [path.name for path in folder.step_checkpoints()] == ["rollout-step=000004.ckpt"]
    assert folder.last.samefile(folder.checkpoint(4))
    assert texts(folder.path) == [(4, line.removeprefix("CollapseGuard: "))]
    assert curves(folder.path)["guard/alarms"] == {1: 0, 2: 0, 3: 0, 4: 1}
    assert not any(r.format_valid for r in read_rollouts(folder.rollout_file("train", 4)))  # though it was not due
    (event,) = results(folder.path)["guard"]
    assert (event["step"], event["back_to"]) == (4, None)
    assert event["curves"]["reward/format_valid"] == {"value": 0.0, "limit": 0.5}


@pytest.mark.long
def test_whoever_goes_on_after_a_stop_is_not_stopped_by_the_same_again(tmp_path: Path) -> None:
    words = (
        *BREAKS,
        "--trainer.callbacks.rate=0",
        *GUARD,
        "--trainer.callbacks.action=stop",
        "--model.rollout_steps=9",
    )
    assert fit(tmp_path, "run", *words) == 0
    assert fit(tmp_path, "run", *words, "--ckpt_path", "last") == 0
    assert results(tmp_path / "run")["rollout_step"] == 9
    assert [e["step"] for e in results(tmp_path / "run")["guard"] if "reward/format_valid" in e["curves"]] == [4]


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that breaks in step 4, goes back to step 2, and gets to step 6 with half the learning rate."""
    root = tmp_path_factory.mktemp("guard")
    assert fit(root, "run", *ROLLBACK, "--model.rollout_steps=6") == 0
    return root / "run"


def test_a_run_that_breaks_goes_back_and_on_with_a_lower_rate(rolled_back: Path) -> None:
    folder = RunFolder(rolled_back)
    found = curves(rolled_back)
    # 3e-4 up to the checkpoint, half of it from there on.
    assert found["update/learning_rate"] == pytest.approx(
        {1: 3e-4, 2: 3e-4, 3: 1.5e-4, 4: 1.5e-4, 5: 1.5e-4, 6: 1.5e-4}
    )
    assert min(found["reward/format_valid"].values()) > 0.5
    assert [path.name[-8:] for path in folder.step_checkpoints()] == [f"0000{step}.ckpt"[-8:] for step in range(1, 7)]
    assert results(rolled_back)["rollout_step"] == 6


def test_what_happened_is_on_record(rolled_back: Path) -> None:
    folder = RunFolder(rolled_back)
    (event,) = results(rolled_back)["guard"]
    assert (event["step"], event["back_to"], event["rate_factor"]) == (4, 2, 0.5)
    ((step, text),) = texts(rolled_back)  # that of step 4 is hidden, as its curves are
    assert step == 2
    assert (
        "going back to rollout step 2, on with 0.5 times the learning rate asked for; training goes on from here"
        in text
    )
    assert not any(r.format_valid for r in read_rollouts(folder.rollout_file("alarm", 4)))
    assert curves(rolled_back)["guard/alarms"] == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1}


@pytest.mark.long
def test_a_rollback_is_a_resume_with_another_rate(rolled_back: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, "plain", *EVERY, "--model.rollout_steps=2") == 0
    more = ("--model.rollout_steps=6", "--model.learning_rate=1.5e-4", "--ckpt_path", "last")
    assert fit(tmp_path, "plain", *EVERY, *more) == 0
    left, right = (RunFolder(path).checkpoint(6) for path in (rolled_back, tmp_path / "plain"))
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in (left, right)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_resume_keeps_the_lower_rate(rolled_back: Path) -> None:
    root, name = rolled_back.parent, rolled_back.name
    assert fit(root, name, *ROLLBACK, "--model.rollout_steps=7", "--ckpt_path", "last") == 0
    assert curves(rolled_back)["update/learning_rate"][7] == pytest.approx(1.5e-4)
    assert len(results(rolled_back)["guard"]) == 1
    # A kill right after the rollback leaves the checkpoint of step 2 alone, which itself knows of nothing.
    older = RunFolder(rolled_back).checkpoint(2)
    words = ("--config", str(rolled_back / "config.yaml"), "--model.rollout_steps=3", "--ckpt_path", str(older))
    assert main(["fit", *words]) == 0
    assert curves(rolled_back)["update/learning_rate"] == pytest.approx({1: 3e-4, 2: 3e-4, 3: 1.5e-4})
    assert len(results(rolled_back)["guard"]) == 1


@pytest.mark.long
def test_a_run_that_breaks_again_and_again_is_stopped(tmp_path: Path) -> None:
    words = (*BREAKS, "--trainer.callbacks.rate=0", *GUARD, "--trainer.callbacks.action=rollback", *EVERY)
    assert fit(tmp_path, "run", *words, "--trainer.callbacks.max_rollbacks=2", "--model.rollout_steps=6") == 0
    first, second, third = results(tmp_path / "run")["guard"]
    assert (first["step"], first["back_to"]) == (second["step"], second["back_to"]) == (4, 2)
    assert second["text"].endswith("going back to rollout step 2, on with 0.25 times the learning rate asked for")
    assert (third["step"], third["back_to"]) == (4, None)
    assert third["text"].endswith("stopping, max_rollbacks is reached")
    kept = sorted(path.name for path in RunFolder(tmp_path / "run").rollouts.glob("alarm-*"))
    assert kept == ["alarm-step-000004-2.jsonl", "alarm-step-000004.jsonl"]
    assert [step for step, _ in texts(tmp_path / "run")] == [2, 2, 4]  # where it went on twice, and where it stopped
    assert results(tmp_path / "run")["rollout_step"] == 4


@pytest.mark.long
def test_without_a_healthy_checkpoint_the_run_is_stopped(tmp_path: Path) -> None:
    words = (*BREAKS, "--trainer.callbacks.rate=0", *GUARD, "--trainer.callbacks.action=rollback")
    assert fit(tmp_path, "run", *words, "--model.rollout_steps=6") == 0  # the first checkpoint is due at step 20
    (event,) = results(tmp_path / "run")["guard"]
    assert event["text"].endswith("stopping, there is no healthy checkpoint to go back to")


def test_the_overlay_only_warns_and_needs_no_logger(tmp_path: Path) -> None:
    words = ("--config", "callbacks/collapse_guard", *BREAKS, "--trainer.callbacks.rate=0", "--trainer.logger", "false")
    assert fit(tmp_path, "run", *words, "--model.rollout_steps=7") == 0
    (event,) = [e for e in results(tmp_path / "run")["guard"] if "reward/format_valid" in e["curves"]]
    assert (event["step"], event["text"][-16:]) == (6, "training goes on")  # with patience
    assert results(tmp_path / "run")["rollout_step"] == 7
