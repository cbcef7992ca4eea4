"""Training in every precision that is accepted, and what stays in float32 in all of them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.fits import SMALL, curves, fit
from torch import Tensor

from calibadv.cli.main import main
from calibadv.config.files import read_words
from calibadv.config.lightning_cli import CalibadvCLI
from calibadv.config.logging import quiet_environment
from calibadv.numerics.logprobs import message_perplexities
from calibadv.policy.loading import load_policy
from calibadv.policy.lora import Lora
from calibadv.policy.policy import Policy
from calibadv.policy.precision import exactly, float32_by_default
from calibadv.runs.folder import RunFolder

DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
# One mini-batch, so that the first update compares a policy with itself.
ONE_UPDATE = ("--model.mini_batches", "1", "--model.group_size", "4", "--data.questions_per_step", "6")
VARIANTS = {
    "kl": ("--config", "regularizers/kl"),
    "lora_kl": ("--model.lora.rank", "4", "--model.learning_rate", "1e-5", "--config", "regularizers/kl"),
    "calibadv": ("--config", "calibrators/calibadv"),
    "igpo": ("--config", "estimators/igpo"),
    "llds": ("--config", "regularizers/llds"),
}


def tensors(run: Path) -> dict[str, Tensor]:
    content: dict[str, Any] = torch.load(RunFolder(run).last, weights_only=True)
    weights: dict[str, Tensor] = content["state_dict"]
    return weights


def assert_finite(run: Path, steps: list[int]) -> None:
    shown = curves(run)
    assert list(shown["stability/grad_norm"]) == steps
    assert all(math.isfinite(value) for points in shown.values() for value in points.values())


@pytest.mark.parametrize("precision", DTYPES)
def test_all_weights_are_trained_in_a_precision(precision: str, tmp_path: Path) -> None:
    words = ("--trainer.precision", precision, "--model.rollout_steps", "3", "--config", "regularizers/kl")
    assert fit(tmp_path, "run", *words, *ONE_UPDATE, "--model.reward", "support.fits.InFloat32") == 0
    assert_finite(tmp_path / "run", [1, 2, 3])
    assert curves(tmp_path / "run")["stability/kl_reference"][1] == 0  # the reference is rounded as the policy is
    before = load_policy("embedded").model.state_dict()
    after = {name.removeprefix("model."): weight for name, weight in tensors(tmp_path / "run").items()}
    assert {weight.dtype for weight in after.values()} == {DTYPES[precision]}
    changed = sum(int((after[name] != before[name].to(DTYPES[precision])).sum()) for name in before)
    assert changed > 0.1 * sum(weight.numel() for weight in before.values())


def test_adapters_take_small_updates_in_bfloat16(tmp_path: Path) -> None:
    words = ("--trainer.precision", "bf16-true", "--model.rollout_steps", "4", "--model.lora.rank", "4")
    assert fit(tmp_path, "run", *words, *ONE_UPDATE, "--model.learning_rate", "1e-6") == 0
    assert_finite(tmp_path / "run", [1, 2, 3, 4])
    before = load_policy("embedded", Lora(4)).model.state_dict()
    after = {name.removeprefix("model."): weight for name, weight in tensors(tmp_path / "run").items()}
    adapters = {name: weight for name, weight in after.items() if ".lora_" in name}
    assert {weight.dtype for weight in adapters.values()} == {torch.float32}
    assert {weight.dtype for name, weight in after.items() if name not in adapters} == {torch.bfloat16}
    changed = sum(int((weight != before[name]).sum()) for name, weight in adapters.items())
    assert changed > 0.9 * sum(weight.numel() for weight in adapters.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", DTYPES)
def test_methods_run_in_a_precision(precision: str, variant: str, tmp_path: Path) -> None:
    words = ("--trainer.precision", precision, "--model.rollout_steps", "2", "--model.group_size", "4")
    assert fit(tmp_path, "run", *words, *VARIANTS[variant]) == 0
    assert_finite(tmp_path / "run", [1, 2])


@pytest.mark.long
def test_a_resumed_run_in_bfloat16_is_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    words = ("--trainer.precision", "bf16-true", *VARIANTS["lora_kl"], *ONE_UPDATE)
    assert fit(tmp_path, "whole", *words, "--model.rollout_steps", "4") == 0
    assert fit(tmp_path, "parts", *words, "--model.rollout_steps", "2") == 0
    assert fit(tmp_path, "parts", *words, "--model.rollout_steps", "4", "--ckpt_path", "last") == 0
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_in_bfloat16_knows_its_reference_again(tmp_path: Path) -> None:
    words = ("--trainer.precision", "bf16-true", *VARIANTS["kl"])
    assert fit(tmp_path, "run", *words, "--model.rollout_steps", "1") == 0
    assert fit(tmp_path, "run", *words, "--model.rollout_steps", "2", "--ckpt_path", "last") == 0


def test_rotary_positions_are_not_rounded(embedded_policy: Policy) -> None:
    model = copy.deepcopy(embedded_policy.model)
    model._apply(exactly(model, lambda some: some.to(torch.bfloat16) if some.is_floating_point() else some))
    before, after = (dict(one.named_buffers()) for one in (embedded_policy.model, model))
    assert before
    for name, buffer in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], buffer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_numbers_are_float32_whatever_the_default_is(default: torch.dtype) -> None:
    # Two messages: 1 and 3 nats per token for two tokens each.
    logprobs = torch.tensor([[0.0, -1.0, -1.0, -3.0, -3.0]], dtype=torch.float32)
    turn_ids = torch.tensor([[-1, 0, 0, 1, 1]])
    torch.set_default_dtype(default)
    try:
        found = message_perplexities(logprobs, turn_ids, turn_ids >= 0, min_tokens=2)
        with float32_by_default():
            assert torch.ones(1).dtype == torch.float32
        assert torch.ones(1).dtype == default
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, torch.tensor([[math.e, math.exp(3)]]))


def test_a_second_fit_makes_no_further_step(tmp_path: Path) -> None:
    quiet_environment()
    words = ["--config", "quickstart", *SMALL, "--model.rollout_steps", "1", "--run.root", str(tmp_path)]
    cli = CalibadvCLI("fit", read_words(words))  # built, and not run
    weights = []
    for _ in range(2):
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            check_val_every_n_epoch=None,
            val_check_interval=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(cli.model, cli.datamodule)
        assert cli.model.rollout_step == 1
        weights.append({name: weight.clone() for name, weight in cli.model.state_dict().items()})
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_what_lightning_calls_an_epoch_changes_nothing(tmp_path: Path) -> None:
    words = ("--model.rollout_steps", "5", "--rollouts.every_n_rollout_steps", "1")
    short = ("--trainer.limit_train_batches", "2")
    assert fit(tmp_path, "whole", *words) == 0
    assert fit(tmp_path, "epochs", *words, *short) == 0
    assert fit(tmp_path, "parts", *words, *short, "--model.rollout_steps", "3") == 0  # in the middle of the second
    assert fit(tmp_path, "parts", *words, *short, "--ckpt_path", "last") == 0
    for name in ("epochs", "parts"):
        for step in range(1, 6):
            file = Path("rollouts") / f"train-step-00000{step}.jsonl"
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
        points = [curve["reward/score"] for curve in map(curves, (tmp_path / name, tmp_path / "whole"))]
        assert points[0] == points[1]


def test_a_run_whose_time_is_up_says_so_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model.rollout_steps", "1000", "--trainer.max_time", "00:00:00:01", "--data.validation", "null")
    assert fit(tmp_path, "run", *words) == 0
    *_, line, command = capsys.readouterr().out.splitlines()
    done: int = torch.load(RunFolder(tmp_path / "run").last, weights_only=True)["rollout_step"]
    assert 0 < done < 1000
    assert line == f"stopped by trainer.max_time or a callback after rollout step {done} of 1000; to continue:"
    assert main(command.split()[1:]) == 0
    assert torch.load(RunFolder(tmp_path / "run").last, weights_only=True)["rollout_step"] > done


def test_a_run_that_trains_nothing_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "run", "--trainer.callbacks+=support.fits.StopsAtOnce") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "a callback has ended the run before its first rollout step, with 0 of 60 done" in output.err
