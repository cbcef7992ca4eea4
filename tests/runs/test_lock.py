from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.fits import files, fit

from calibadv.errors import UserError
from calibadv.runs.folder import RunFolder
from calibadv.runs.lock import RunLock

HOLD = """
import os, sys, time
from pathlib import Path
from calibadv.runs.folder import RunFolder
from calibadv.runs.lock import RunLock

lock = RunLock()
lock.take(RunFolder(Path(sys.argv[1])))
if len(sys.argv) > 2 and os.fork():
    time.sleep(60)  # the worker says that it is there, and outlives this process
print("held", flush=True)
time.sleep(60)
"""


def holder(folder: Path, *words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *words], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "run", "--model.rollout_steps", "1") == 0
    process = holder(tmp_path / "run")
    try:
        before = files(tmp_path / "run")
        for words in (("--ckpt_path", "last"), ("--ckpt_path", "auto")):
            capsys.readouterr()
            assert fit(tmp_path, "run", "--model.rollout_steps", "2", *words) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert f"another process ({process.pid} on " in error
            assert f") is writing into {tmp_path / 'run'}; wait for it or stop it, or choose another" in error
        assert files(tmp_path / "run") == before
    finally:
        end(process)
    assert fit(tmp_path, "run", "--model.rollout_steps", "2", "--ckpt_path", "last") == 0


def test_the_death_of_a_process_frees_its_lock_though_a_worker_lives_on(tmp_path: Path) -> None:
    process = holder(tmp_path / "run", "with a worker")
    try:
        with RunLock() as lock, pytest.raises(UserError, match="another process"):
            lock.take(RunFolder(tmp_path / "run"))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with RunLock() as lock:
            lock.take(RunFolder(tmp_path / "run"))
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_what_was_made_for_the_lock_alone_is_removed(tmp_path: Path) -> None:
    with RunLock() as lock:
        lock.take(RunFolder(tmp_path / "root/run"))
        assert (tmp_path / "root/run").is_dir()
        lock.take(RunFolder(tmp_path / "root/run"))  # as after a guard's rollback
    assert list(tmp_path.iterdir()) == []
    with RunLock() as lock:
        lock.take(RunFolder(tmp_path / "run"))
        (tmp_path / "run/config.yaml").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_file_system_without_locks_gets_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock() as lock:
        lock.take(RunFolder(tmp_path / "run"))
        lock.take(RunFolder(tmp_path / "run"))
    (warning,) = caplog.messages
    assert (
        warning
        == f"{tmp_path / 'run'} cannot be locked (No locks available): make sure that no other process writes into it"
    )


def test_a_refused_command_leaves_no_folder(tmp_path: Path) -> None:
    assert fit(tmp_path, "run", "--model.protocol.max_rollout_tokens", "10") == 2
    assert list(tmp_path.iterdir()) == []
