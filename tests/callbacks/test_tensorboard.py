from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.fits import SMALL, curves, fit, results
from support.records import answer, rollout, search
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from calibadv.batch import StepOutput, collate
from calibadv.callbacks.tensorboard import FIGURES, PANEL, histograms, swept_settings
from calibadv.cli.main import main
from calibadv.runs.folder import RunFolder
from calibadv.types import RolloutStatus

# Curves of the panel that only some runs have: with a reference model, with the callback that watches, and in trouble.
ELSEWHERE = {"stability/kl_reference", "guard/alarms", "stability/skipped_updates"}
# What the panel leaves out: counts, parts of a source but for F1, and what belongs to one method or setting.
LEFT_OUT = ("val/(.+/)?(score|em|cover_em|searches|format_valid|count|search_failed)", "update/(loss|learning_rate)")
LEFT_OUT = (*LEFT_OUT, "advantage/rebalance_factor", "outcome/(best_f1|final_f1|collapsed)")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of CalibAdv, and one more after a resume from the second."""
    root = tmp_path_factory.mktemp("tensorboard")
    words = ("--trainer.val_check_interval", "1", "--rollouts.every_n_rollout_steps", "2")
    words = (*words, "--checkpoint.every_n_rollout_steps", "1", "--checkpoint.keep", "0", "--model.group_size", "6")
    assert fit(root, "run", "--config", "calibrators/calibadv", *words, "--model.rollout_steps", "3") == 0
    older = RunFolder(root / "run").checkpoint(1)
    assert main(["fit", "--config", str(root / "run" / "config.yaml"), "--ckpt_path", str(older)]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run), size_guidance={"tensors": 0})
    found.Reload()
    return found


def panel(events: EventAccumulator) -> dict[str, list[str]]:
    content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    (page,) = Layout.FromString(content).category
    assert page.title == "stability panel"
    return {chart.title: list(chart.multiline.tag) for chart in page.chart}


def test_the_panel_is_one_page_of_curves_that_there_are(events: EventAccumulator, run: Path) -> None:
    tags = set(curves(run)) | ELSEWHERE | {"rollout/seconds", "rollout/tokens_per_second", "update/seconds"}
    tags |= {"credit/mispenalised", "credit/true_mispenalised", "credit/softened"}  # not in every step of a small run
    charts = panel(events)
    assert list(charts) == list(PANEL)
    for title, patterns in charts.items():
        for pattern in patterns:
            assert any(re.match(pattern, tag) for tag in tags), f"{title}: {pattern}"


def test_every_curve_of_a_run_is_in_the_panel_or_left_out_on_purpose(events: EventAccumulator, run: Path) -> None:
    patterns = [*(pattern for chart in panel(events).values() for pattern in chart), *LEFT_OUT]
    assert [tag for tag in curves(run) if not any(re.fullmatch(pattern, tag) for pattern in patterns)] == []


def test_settings_stand_beside_figures_in_the_runs_own_folder(events: EventAccumulator, run: Path) -> None:
    tags = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(tags["_hparams_/session_start_info"]).session_start_info
    settings = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert settings["calibrators"] == "[SoftPenalty, AnswerRebalance(target_ratio=1.0)]"
    assert (settings["learning_rate"], settings["seed_everything"], settings["prepend_think"]) == (3e-4, 0, True)
    experiment = HParamsPluginData.FromString(tags["_hparams_/experiment"]).experiment
    assert [info.name.tag for info in experiment.metric_infos] == list(FIGURES)
    assert set(FIGURES) <= set(curves(run))
    assert not [path for path in run.rglob("events.*") if path.parent != run]


def test_the_last_figures_are_those_of_the_results(run: Path) -> None:
    found = curves(run)
    for name in ("best_f1", "final_f1", "collapsed"):
        curve = found[f"outcome/{name}"]
        assert list(curve) == [0, 1, 2, 3]
        assert curve[3] == pytest.approx(float(results(run)[name]))


def test_what_a_resume_does_again_is_shown_once(events: EventAccumulator) -> None:
    # TensorBoard's own reading, in which the first marked start of a run hides nothing.
    for tag in ("reward/score", "outcome/best_f1"):
        steps = [event.step for event in events.Tensors(tag)]
        assert steps == sorted(set(steps)), tag


def test_histograms_are_drawn_at_the_steps_whose_rollouts_are_written(events: EventAccumulator) -> None:
    for name in ("advantage_estimated", "advantage_calibrated"):
        assert [event.step for event in events.Tensors(f"histograms/{name}")] == [1, 2]


def test_histograms_hold_trained_tokens_and_search_turns() -> None:
    batch = collate(
        [
            rollout(search("a", tokens=1), search("b", tokens=1), answer("x", tokens=1), step_correctness=(0.5, 0.0)),
            rollout(search("c"), status=RolloutStatus.SEARCH_FAILED, step_correctness=(1.0,)),
            rollout(answer("y", tokens=2)),
        ]
    )
    advantages = torch.tensor([[1.0], [5.0], [-2.0]]).expand(batch.loss_mask.shape)
    found = histograms(StepOutput(1, batch, advantages, advantages / 2, {}, {}))
    np.testing.assert_array_equal(found["histograms/advantage_estimated"], [1, 1, 1, -2, -2])
    np.testing.assert_array_equal(found["histograms/advantage_calibrated"], [0.5, 0.5, 0.5, -1, -1])
    np.testing.assert_array_equal(found["histograms/step_correctness"], [0.5, 0.0])


def test_settings_are_flat_and_readable(run: Path) -> None:
    config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    settings = swept_settings(config)
    assert all(isinstance(value, str | int | float | bool) for value in settings.values())
    assert settings["estimator"] == "GRPO"
    assert settings["betas"] == "[0.9, 0.999]"
    assert settings["data.questions_per_step"] == int(SMALL[1])
    assert settings["lora"] == "null"
    config["trainer"]["callbacks"] = None
    assert swept_settings(config)["calibrators"] == "none"


def test_without_tensorboard_nothing_is_missed(tmp_path: Path) -> None:
    assert fit(tmp_path, "run", "--trainer.logger", "false", "--model.rollout_steps", "1") == 0
    assert not list((tmp_path / "run").glob("events.*"))
    assert json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["rollout_step"] == 1
