"""CPU threads: few for a small policy, as many as the user says, and none that spins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from calibadv.config.threads import limit_threads, sleep_while_waiting


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # noted, so that what is set below is taken back
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("module", ["calibadv", "calibadv.cli.main"])
def test_torch_is_not_loaded_before_the_threads_are_decided(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {module}, sys; assert 'torch' not in sys.modules"], check=True)


def test_a_small_policy_has_one_thread(two_threads: None) -> None:
    limit_threads(nn.Linear(10, 10))
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"  # what further processes of a strategy are started with


def test_a_larger_one_keeps_all(two_threads: None) -> None:
    limit_threads(nn.Linear(4000, 4000, device="meta"))
    assert torch.get_num_threads() == 2
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_user_s_number_counts(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    limit_threads(nn.Linear(10, 10))
    assert torch.get_num_threads() == 2


def test_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    sleep_while_waiting()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    sleep_while_waiting()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
