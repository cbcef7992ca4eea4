"""Gradients and weights that are not finite: what is not done with them, and what is said and kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.agents import Bigram, episode
from support.fits import Poison, curves, fit
from support.training import HandFed, accumulate, module_of, update
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from calibadv.batch import collate
from calibadv.distributed import apply_fsdp
from calibadv.errors import UserError
from calibadv.estimators import GRPO
from calibadv.interfaces import Regularizer
from calibadv.runs.folder import RunFolder
from calibadv.training.logprobs import UpdateBatch, compute_logprobs
from calibadv.training.minibatches import mini_batches
from calibadv.training.optimization import find_non_finite
from calibadv.types import Rollout


def three_questions(model: nn.Module) -> UpdateBatch:
    """Two rollouts each: the second, which says 1, is rewarded. The prompt is 0."""
    rollouts: list[Rollout] = [
        episode((0,), (place, 1), question=name, score=float(place)) for name in "abc" for place in range(2)
    ]
    batch = collate(rollouts)
    advantages = GRPO().estimate(batch)
    return UpdateBatch(batch, advantages, advantages, compute_logprobs(model, batch, 10_000, 1.0))


def three_mini_batches(*terms: Regularizer, root: Path | None = None) -> HandFed:
    return module_of(Bigram(torch.zeros(2, 2)), *terms, root=root, mini_batches=3, clip_norm=1.0)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "optimizer step" in record.getMessage()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_left_out(value: float, caplog: pytest.LogCaptureFixture) -> None:
    module = three_mini_batches(Poison([2], value))
    with caplog.at_level(logging.WARNING):
        metrics = update(module, three_questions(module.model), step=7)
    # Weights, moments and curves are those of the first and the third mini-batch alone.
    other = three_mini_batches(Poison([]))
    ready = three_questions(other.model)
    first, _, third = mini_batches(ready.batch, 3, other.seed, step=7)
    optimizers = [m.trainer.optimizers[0] for m in (module, other)]
    expected = []
    for rows in (first, third):
        expected.append(accumulate(other, ready, rows)[0])
        optimizers[1].step()
    tables = [m.model.table for m in (module, other)]
    assert torch.equal(*tables)
    assert find_non_finite(module.model, optimizers[0]) is None
    for name, moment in optimizers[1].state[tables[1]].items():
        assert torch.equal(optimizers[0].state[tables[0]][name], moment), name
    assert metrics["stability/skipped_updates"] == 1
    norms = [update["grad_norm"] for update in expected]
    assert metrics["stability/grad_norm"] == pytest.approx(sum(norms) / 2)
    assert metrics["stability/grad_norm_max"] == max(norms)
    assert metrics["update/loss"] == pytest.approx(sum(update["loss"] for update in expected) / 2)
    assert all(math.isfinite(number) for number in metrics.values())
    (warning,) = warnings(caplog)
    assert warning.startswith("rollout step 7, mini-batch 2 of 3: the norm of the gradient is ")
    assert module.finite_steps.skipped_in_a_row == 0  # the third was made


def test_a_step_without_any_is_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    module = three_mini_batches()
    assert "stability/skipped_updates" not in update(module, three_questions(module.model))
    assert warnings(caplog) == []


def test_one_element_of_many_is_enough() -> None:
    model = nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 100)).sum().backward()
        optimizer.step()
    assert find_non_finite(model, optimizer) is None
    optimizer.state[model.bias]["exp_avg_sq"][17] = math.inf
    assert find_non_finite(model, optimizer) == "exp_avg_sq of bias"
    with torch.no_grad():
        model.weight[3, 4] = math.nan
    assert find_non_finite(model, optimizer) == "weight"
    assert find_non_finite(model, torch.optim.AdamW(model.parameters())) == "weight"  # without any moment yet


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    dist.destroy_process_group()


def test_of_a_sharded_model_the_own_shard_is_looked_at(mesh: DeviceMesh) -> None:
    model = nn.Linear(4, 4)
    apply_fsdp(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert isinstance(model.weight, DTensor)
    assert find_non_finite(model, optimizer) is None
    optimizer.state[model.bias]["exp_avg"].to_local()[2] = math.nan
    assert find_non_finite(model, optimizer) == "exp_avg of bias"
    with torch.no_grad():
        model.weight.to_local()[1, 2] = math.inf
    assert find_non_finite(model, optimizer) == "weight"


def run_steps(root: Path, calls: Sequence[int], steps: int, in_a_row: int = 0) -> int:
    module = three_mini_batches(Poison(list(calls)), root=root)
    module.finite_steps.skipped_in_a_row = in_a_row
    for step in range(1, steps + 1):
        update(module, three_questions(module.model), step)
    return module.finite_steps.skipped_in_a_row


def test_three_in_a_row_stop_the_run_wherever_rollout_steps_begin(tmp_path: Path) -> None:
    assert run_steps(tmp_path, [1, 2, 4, 5], steps=2) == 0  # the third of each was made
    assert run_steps(tmp_path, [2, 3], steps=1) == 2
    with pytest.raises(UserError, match="the gradient of 3 mini-batches in a row was not finite"):
        run_steps(tmp_path, [2, 3, 4], steps=2)
    with pytest.raises(UserError, match="the gradient of 3 mini-batches in a row was not finite"):
        run_steps(tmp_path, [1], steps=1, in_a_row=2)  # after a resume
    assert run_steps(tmp_path, [2], steps=1, in_a_row=2) == 0


# Through the command line: two mini-batches per rollout step, of one question with two rollouts each.


def poison(*calls: int) -> tuple[str, ...]:
    return ("--model.regularizers+=support.fits.Poison", f"--model.regularizers.calls={list(calls)}")


EVERY = ("--checkpoint.every_n_rollout_steps", "1", "--data.validation", "null")


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def finite(path: Path) -> bool:
    return all(bool(value.isfinite().all()) for value in load(path)["state_dict"].values())


def test_a_run_goes_on_after_single_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = (*EVERY, *poison(2, 3), "--model.rollout_steps", "3")
    assert fit(tmp_path, "run", *words) == 0
    shown = curves(tmp_path / "run")
    assert shown["stability/skipped_updates"] == {1: 1, 2: 1}
    assert list(shown["stability/grad_norm"]) == [1, 2, 3]
    assert all(math.isfinite(value) for points in shown.values() for value in points.values())
    assert [text.partition(":")[0] for text in warnings(caplog)] == [
        "rollout step 1, mini-batch 2 of 2",
        "rollout step 2, mini-batch 1 of 2",
    ]
    assert finite(RunFolder(tmp_path / "run").last)


def test_after_three_in_a_row_the_run_stops_and_leaves_the_mini_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*EVERY, "--rollouts.every_n_rollout_steps", "1", "--model.rollout_steps", "4", "--model.kl_coef", "0.1")
    assert fit(tmp_path, "run", *words, *poison(2, 3, 4)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    folder = RunFolder(tmp_path / "run")
    dump = folder.path / "nonfinite-step-000002.pt"
    assert (
        "rollout step 2, mini-batch 2 of 2: the gradient of 3 mini-batches in a row was not finite (the last norm"
        in error
    )
    assert f"the last of them lies in '{dump}': look at it, and resume with a lower model.learning_rate" in error
    assert [path.name for path in folder.step_checkpoints()] == ["rollout-step=000001.ckpt"]
    assert finite(folder.last)

    kept = load(dump)
    assert len(set(kept["question_ids"])) == 1
    assert kept["samples"] == [0, 1]
    assert math.isnan(kept["grad_norm"])
    shape = kept["token_ids"].shape
    assert shape[0] == 2
    for name in ("attention_mask", "loss_mask", "turn_ids", "advantages", "old_logprobs", "reference_logprobs"):
        assert kept[name].shape == shape, name
    trained: Tensor = kept["loss_mask"]
    assert torch.equal(kept["turn_ids"] >= 0, trained)
    assert (kept["old_logprobs"][trained] <= 0).all()
    assert not kept["old_logprobs"][~trained].any()

    # The file does not stand in the way of a resume, which goes on from the checkpoint.
    assert fit(tmp_path, "run", *words, "--ckpt_path", "last") == 0
    assert dump.exists()
    assert load(folder.last)["skipped_in_a_row"] == 0


def test_a_stop_saves_the_count_of_the_step_that_is_saved(tmp_path: Path) -> None:
    """Of two mini-batches a step, the second of step 1 and both of step 2 are skipped."""
    assert fit(tmp_path, "run", *EVERY, *poison(2, 3, 4), "--model.rollout_steps", "2") == 2
    content = load(RunFolder(tmp_path / "run").last)
    assert (content["rollout_step"], content["skipped_in_a_row"]) == (1, 1)


def test_the_count_survives_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "run", *EVERY, *poison(2), "--model.rollout_steps", "1") == 0
    last = RunFolder(tmp_path / "run").last
    content = load(last)
    assert content["skipped_in_a_row"] == 1
    words = (*EVERY, *poison(1, 2), "--model.rollout_steps", "2")
    assert fit(tmp_path, "run", *words, "--ckpt_path", "last") == 2
    assert "mini-batch 2 of 2: the gradient of 3 mini-batches in a row" in capsys.readouterr().err
    del content["skipped_in_a_row"]  # as older versions wrote it
    torch.save(content, tmp_path / "older.ckpt")
    assert fit(tmp_path, "other", *words, "--ckpt_path", tmp_path / "older.ckpt") == 0
    assert load(RunFolder(tmp_path / "other").last)["skipped_in_a_row"] == 2
