from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from support.fits import SMALL, curves, results
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from calibadv.cli.main import main
from calibadv.distributed import ProcessGroup, longest_wait
from calibadv.runs.checkpoints import damage

# Two mini-batches of two questions, more micro-batches than processes, and a validation that two do not divide.
THREE_STEPS = (
    *("--config", "quickstart", *SMALL, "--data.questions_per_step", "4", "--data.validation_questions", "5"),
    *("--model.group_size", "10", "--model.rollout_steps", "3", "--model.micro_batch_tokens", "512"),
    *("--model.learning_rate", "1e-4", "--trainer.val_check_interval", "3", "--rollouts.every_n_rollout_steps", "1"),
)
KINDS = {
    "plain": (),
    "kl": ("--model.kl_coef", "0.1"),
    "lora": ("--model.lora", '{"rank": 4}', "--model.kl_coef", "0.1"),
}
FSDP = """
trainer:
  strategy:
    class_path: lightning.pytorch.strategies.ModelParallelStrategy
    init_args: {data_parallel_size: 2, tensor_parallel_size: 1, save_distributed_checkpoint: false}
"""


@given(st.integers(1, 5), st.integers(0, 12))
def test_work_is_dealt_once_and_in_step(size: int, number: int) -> None:
    dealt = [ProcessGroup(rank, size).partition(range(number)) for rank in range(size)]
    assert len({len(own) for own in dealt}) == 1
    assert sorted(part for own in dealt for part, is_padding in own if not is_padding) == list(range(number))


@given(st.integers(1, 5), st.lists(st.sampled_from("abcdef")))
def test_a_question_has_one_owner_however_often_it_is_asked(size: int, keys: list[str]) -> None:
    owners = ProcessGroup(0, size).assign_ranks(keys)
    assert len(set(zip(keys, owners, strict=True))) == len(set(keys))  # a group is never split
    shares = [len({key for key, owner in zip(keys, owners, strict=True) if owner == rank}) for rank in range(size)]
    assert max(shares) - min(shares) <= 1


def test_a_process_keeps_the_others_waiting_for_less_than_they_do() -> None:
    minute = timedelta(minutes=1)
    for strategy in (DDPStrategy(timeout=minute), ModelParallelStrategy(timeout=minute)):
        assert longest_wait(strategy) == 30.0
    assert longest_wait(SingleDeviceStrategy()) == math.inf


COMMAND = [sys.executable, "-m", "calibadv.cli.main", "fit", *THREE_STEPS]
PARTS = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # of fits.py
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PARTS}
DDP = ("--trainer.strategy", "ddp", "--trainer.devices", "2")


def run(folder: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--run.root", str(folder), "--run.name", name, *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(folder: Path, strategy: str, kind: str) -> None:
    alone, both = folder / f"alone-{kind}", folder / f"{strategy}-{kind}"
    if not alone.exists():
        assert run(alone.parent, alone.name, *KINDS[kind]).returncode == 0
    (folder / "fsdp.yaml").write_text(FSDP)
    chosen = ("--config", str(folder / "fsdp.yaml")) if strategy == "fsdp" else ("--trainer.strategy", "ddp")
    finished = run(folder, both.name, *chosen, "--trainer.devices", "2", *KINDS[kind])
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("validation F1") == 1  # one of them speaks

    expected, found = (
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for path in (alone, both)
    )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if ".lora_A." in name:  # while B is near 0 its gradient is rounding noise, which AdamW scales up to whole steps
            continue
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)

    other = curves(both)
    assert other.keys() == curves(alone).keys()
    for tag, values in curves(alone).items():
        assert other[tag] == pytest.approx(values, abs=2e-4, rel=1e-3), tag
    assert results(both)["validations"] == results(alone)["validations"]
    assert results(both)["statuses"] == results(alone)["statuses"]
    one, two = ((path / "rollouts" / "train-step-000001.jsonl").read_text() for path in (alone, both))
    assert one == two  # later ones may differ in the last digit of an advantage's mean


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_at_one_process_is_left_out_by_all(folder: Path, strategy: str) -> None:
    """As one process leaves it out, of whichever process's rollouts it comes."""
    keep = ("--model.rollout_steps", "2", "--data.validation", "null", "--trainer.callbacks+=support.fits.KeepWeights")
    poison = (*keep, "--model.regularizers+=support.fits.Poison", "--model.regularizers.calls=[1]")
    alone = folder / "poisoned-alone"
    if not alone.exists():
        assert run(folder, alone.name, *poison).returncode == 0
    (folder / "fsdp.yaml").write_text(FSDP)
    chosen = ("--config", str(folder / "fsdp.yaml"), "--trainer.devices", "2") if strategy == "fsdp" else DDP
    both = folder / f"poisoned-{strategy}"
    finished = run(folder, both.name, *chosen, *poison, "--model.regularizers.rank=1")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("rollout step 1, mini-batch 1 of 2: the norm of the gradient is nan") == 1
    assert curves(both)["stability/skipped_updates"] == curves(alone)["stability/skipped_updates"] == {1: 1}
    expected, found = (
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for path in (alone, both)
    )
    for name, value in expected.items():
        assert value.isfinite().all()
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)
    if strategy == "ddp":  # shards are no copies that could differ
        first, second = (torch.load(both / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
        assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_stop_when_no_gradient_is_finite(folder: Path, strategy: str) -> None:
    (folder / "fsdp.yaml").write_text(FSDP)
    chosen = ("--config", str(folder / "fsdp.yaml"), "--trainer.devices", "2") if strategy == "fsdp" else DDP
    calls = f"--model.regularizers.calls={list(range(1, 99))}"
    words = (
        "--data.validation",
        "null",
        "--model.regularizers+=support.fits.Poison",
        calls,
        "--model.regularizers.rank=1",
    )
    finished = run(folder, f"stops-{strategy}", *chosen, *words)
    assert finished.returncode == 2, finished.stderr
    path = folder / f"stops-{strategy}" / "nonfinite-step-000002.pt"
    assert f"the last of them lies in '{path}'" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert len(torch.load(path, weights_only=True)["samples"]) == 20  # of both processes


def fault(place: str, error: str = "user", rank: int | None = 1) -> tuple[str, ...]:
    arguments = {"step": 2, "place": place, "error": error, "rank": rank}
    return ("--trainer.callbacks+", json.dumps({"class_path": "support.faults.Fault", "init_args": arguments}))


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_error_at_one_process_while_sampling_is_shared_and_saved(folder: Path, strategy: str) -> None:
    alone = folder / "alone-plain"
    if not alone.exists():
        assert run(alone.parent, alone.name).returncode == 0
    (folder / "fsdp.yaml").write_text(FSDP)
    chosen = ("--config", str(folder / "fsdp.yaml"), "--trainer.devices", "2") if strategy == "fsdp" else DDP
    broken = folder / f"broken-{strategy}"
    if strategy == "ddp":
        finished = run(folder, broken.name, *chosen, *fault("score"))
        assert "calibadv: error: process 1: " in finished.stderr
    else:
        finished = run(folder, broken.name, *chosen, *fault("search", "retrieval", rank=None))
        assert "40 of 40 searches of step 2 failed" in finished.stderr
    assert finished.returncode == 2, finished.stderr
    assert "rollout step 1, the last one that was finished, is saved" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert (broken / "checkpoints" / "rollout-step=000001.ckpt").exists()
    finished = run(folder, broken.name, *chosen, "--ckpt_path", "last")
    assert finished.returncode == 0, finished.stderr
    expected, found = (
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for path in (alone, broken)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.long
def test_an_error_at_one_process_elsewhere_saves_nothing_and_ends_all(folder: Path) -> None:
    finished = run(folder, "elsewhere", *DDP, *fault("logprobs"))  # run() would not wait for a process that hangs
    assert finished.returncode != 0
    assert list((folder / "elsewhere" / "checkpoints").glob("*")) == []


@pytest.mark.long
def test_sharded_checkpoints_are_read_by_any_number_of_processes(folder: Path) -> None:
    alone = folder / "alone-plain"
    if not alone.exists():
        assert run(alone.parent, alone.name).returncode == 0
    sharded, joined = (folder / f"{name}.yaml" for name in ("sharded", "fsdp"))
    joined.write_text(FSDP)
    sharded.write_text(FSDP.replace("checkpoint: false", "checkpoint: true"))
    one, two = (("--trainer.devices", number, "--trainer.strategy.data_parallel_size", number) for number in "12")
    first = run(folder, "sharded", "--config", str(sharded), *two, "--model.rollout_steps", "1")
    assert first.returncode == 0, first.stderr
    assert (folder / "sharded" / "checkpoints" / "last.ckpt").is_dir()
    refused = run(folder, "sharded", "--ckpt_path", "last")
    assert "is sharded, and trainer.strategy is auto; add --config cluster/fsdp" in refused.stderr
    for steps, processes, config in (("2", two, sharded), ("3", one, joined)):
        words = ("--config", str(config), "--ckpt_path", "last", "--model.rollout_steps", steps)
        finished = run(folder, "sharded", *words, *processes)
        assert finished.returncode == 0, finished.stderr
    (shard,) = (folder / "sharded/checkpoints/rollout-step=000002.ckpt").glob("__1_0.distcp")
    assert main(["export", str(shard.parent), "--out", str(folder / "exported")]) == 0
    dcp_to_torch_save(shard.parent, folder / "joined.pt")
    weights = torch.load(folder / "joined.pt", weights_only=True)["state_dict"]
    model = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[f"model.{name}"]), name
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    assert damage(shard.parent) is None
    shard.write_bytes(content)
    assert damage(shard.parent) == "its file __1_0.distcp is damaged"
    shard.unlink()
    assert damage(shard.parent) == "its file __1_0.distcp is missing"
    expected, found = (
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for path in (alone, folder / "sharded")
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.long
def test_a_signal_to_one_process_during_a_validation_stops_all(folder: Path) -> None:
    path = folder / "stopped"
    words = (*DDP, "--data.validation_questions", "200", "--run.root", str(folder), "--run.name", path.name)
    with subprocess.Popen(
        [*COMMAND, *words], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as first:
        for _ in range(600):
            if (path / "config.yaml").exists():
                break
            time.sleep(0.1)
        time.sleep(1)  # the validation before training has begun, and takes longer than that
        tasks = Path(f"/proc/{first.pid}/task/{first.pid}/children")
        (second,) = (int(child) for child in tasks.read_text().split() if "calibadv" in cmdline(child))
        os.kill(second, signal.SIGTERM)
        output, _ = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM, output
    assert (path / "checkpoints" / "last.ckpt").exists()


def cmdline(process: str) -> str:
    return Path(f"/proc/{process}/cmdline").read_text()


def test_shards_for_more_processes_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--config", "cluster/fsdp", "--trainer.devices", "2", "--run.root", str(tmp_path), "--run.name", "x")
    assert main(["fit", *THREE_STEPS, *words]) == 2
    error = capsys.readouterr().err
    assert "data_parallel_size is 8 and there are 2 processes" in error
    assert error.count("\n") == 1


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    finished = run(
        tmp_path, "uneven", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.questions_per_step", "3"
    )
    assert finished.returncode != 0
    assert "data.questions_per_step is 3 and there are 2 processes" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "uneven").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--trainer.strategy", "deepspeed"],
            "trainer.strategy is deepspeed; give auto, ddp, or --config cluster/fsdp",
        ),
        (
            ["--trainer.strategy", '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'],
            "tensor_parallel_size is auto; it must be 1",
        ),
    ],
)
def test_strategies_that_would_not_do_what_is_meant(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *THREE_STEPS, "--run.root", str(tmp_path), "--run.name", "x", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "x").exists()
