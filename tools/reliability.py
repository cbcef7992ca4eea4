"""Break runs in every way that docs/reliability.md promises something about, and see that they keep it.

    python tools/reliability.py kills [--trials 5] [--seed 0]      30 kills over six methods
    python tools/reliability.py outages                            a retrieval server that is gone for 5, 20 and 90 s
    python tools/reliability.py failures                           1, 20 and 100 % of the queries fail
    python tools/reliability.py disk                               a full disk at every kind of write (needs root)
    python tools/reliability.py sigterm                            SIGTERM while the retriever is waited for, or hangs

Each prints one table, and ends with status 1 if a promise is broken. Runs are six steps of the quickstart, one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from digest import curves, rollouts, tensors

from calibadv.retrieval import BM25
from calibadv.retrieval.http.schema import parse_request, render_results
from calibadv.runs.folder import RunFolder

STEPS = 6
SMALL = (
    *(
        "--model.rollout_steps",
        str(STEPS),
        "--trainer.val_check_interval",
        "3",
        "--rollouts.every_n_rollout_steps",
        "1",
    ),
    *("--checkpoint.every_n_rollout_steps", "2", "--data.questions_per_step", "4", "--data.validation_questions", "12"),
)
VARIANTS = {
    "grpo": (),
    "calibadv": ("--config", "calibrators/calibadv"),
    "kl": ("--config", "regularizers/kl"),
    "lora": ("--model.lora.rank", "4"),
    "dynamic sampling": ("--config", "filters/dynamic_sampling"),
    "llds, guard": ("--config", "regularizers/llds", "--config", "callbacks/collapse_guard"),
}
AUTO = ("--ckpt_path", "auto")
# Kinds of moments to be killed at; each trial of a method takes the next one.
MOMENTS = ("any time", "any file", "in a checkpoint", "at the end", "any time")


def main() -> int:
    """Run one of the experiments; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["kills", "outages", "failures", "disk", "sigterm", "killed-fit"])
    parser.add_argument("--trials", type=int, default=len(MOMENTS))
    parser.add_argument("--seed", type=int, default=0)
    options, words = parser.parse_known_args()
    if options.what == "killed-fit":
        return killed_fit(words)
    with tempfile.TemporaryDirectory() as root:
        experiment: Callable[[Path], Iterator[tuple[str, str, bool]]] = {
            "kills": lambda root: kills(root, options.trials, options.seed),
            "outages": outages,
            "failures": failures,
            "disk": disk,
            "sigterm": sigterm,
        }[options.what]
        kept = True
        for case, found, good in experiment(Path(root)):
            kept = kept and good
            print(f"{case:<44} {found:<70} {'kept' if good else 'BROKEN'}", flush=True)
    return 0 if kept else 1


def fit_command(root: Path, name: str, *words: str) -> list[str]:
    """The words of a small run, behind the interpreter."""
    return ["fit", "--config", "quickstart", *words, *SMALL, "--run.root", str(root), "--run.name", name]


def start(words: list[str], *prefix: str) -> subprocess.Popen[str]:
    """Start a command of calibadv with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, *(prefix or ("-m", "calibadv.cli.main")), *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def fit(root: Path, name: str, *words: str) -> tuple[int, str]:
    """Train to the end; returns status and output."""
    process = start(fit_command(root, name, *words))
    output, _ = process.communicate()
    return process.returncode, output


def sums(run: Path) -> dict[str, str]:
    """Digests of what a run leaves: rollouts, curves, tensors, and its results without times and names."""
    results = RunFolder(run).read_results()
    for key in ("name", "wall_seconds", "command"):
        results.pop(key, None)
    parts = {"rollouts": rollouts(run), "curves": curves(run), "tensors": tensors(run)}
    found = {name: blake2b(b"\0".join(items), digest_size=8).hexdigest() for name, items in parts.items()}
    return {**found, "results": json.dumps(results, sort_keys=True)}


def differences(one: dict[str, str], other: dict[str, str]) -> str:
    """The parts in which two runs differ."""
    wrong = [name for name in one if one[name] != other[name]]
    return f"differs: {', '.join(wrong)}" if wrong else "identical"


# Kills


def kills(root: Path, trials: int, seed: int) -> Iterator[tuple[str, str, bool]]:
    """Kill runs at random moments, and resume them."""
    draw = random.Random(seed)
    identical = number = 0
    for variant, words in VARIANTS.items():
        name = variant.replace(" ", "-").replace(",", "")
        whole = f"{name}-whole"
        began = time.monotonic()
        status, output = fit(root, whole, *words)
        seconds = time.monotonic() - began
        assert status == 0, output
        expected = sums(root / whole)
        for trial in range(trials):
            moment = MOMENTS[trial % len(MOMENTS)]
            run = f"{name}-{trial}"
            told = killed(root, run, words, moment, draw, seconds)
            status, output = fit(root, run, *words, *AUTO)
            found = differences(expected, sums(root / run)) if status == 0 else output.strip().splitlines()[-1]
            number += 1
            identical += found == "identical"
            yield f"{variant}: killed {moment}", f"{told}; {found}", found == "identical"
    yield "all", f"{identical} of {number} identical to the uninterrupted run", identical == number


def killed(root: Path, run: str, words: tuple[str, ...], moment: str, draw: random.Random, seconds: float) -> str:
    """Start a run and kill it; returns where."""
    tool = str(Path(__file__))
    arguments = fit_command(root, run, *words, *AUTO)
    if moment == "any time":
        while True:
            process = start(arguments)
            time.sleep(draw.uniform(0.3, 1.0) * seconds)
            process.kill()
            if process.wait() < 0:
                break
            shutil.rmtree(root / run)  # it was faster this time, and had ended
    else:
        point = {
            "any file": draw.randint(1, 150),
            "in a checkpoint": draw.randint(1, 3),
            "at the end": draw.randint(1, 12),
        }
        prefix = (tool, "killed-fit", "--seed", str(draw.randint(0, 10**6)))
        process = start([moment, str(point[moment]), str(root / run), *arguments], *prefix)
    process.communicate()
    steps = [int(path.stem[-6:]) for path in (root / run / "checkpoints").glob("rollout-step=*.ckpt")]
    left = [path.name for path in (root / run / "checkpoints").glob("*.partial")]
    return f"status {process.returncode}, checkpoint {max(steps, default='none')}{', ' + left[0] if left else ''}"


def killed_fit(words: list[str]) -> int:
    """Run a command that kills itself at a moment: before the n-th operation on a file, or in the n-th checkpoint."""
    moment, number, folder, *arguments = words
    left, ended = int(number), False

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal left, ended
        if event not in ("open", "os.rename", "os.link", "os.remove", "os.mkdir") or folder not in str(details[0]):
            return
        path = str(details[0])
        if moment == "in a checkpoint":
            if event == "open" and path.endswith(".partial") and "rollout-step" in path:
                left -= 1
                if left == 0:  # in the middle of the writing, which takes some milliseconds
                    threading.Timer(random.uniform(0, 0.01), os.kill, (os.getpid(), signal.SIGKILL)).start()
            return
        ended = ended or (event == "os.rename" and f"step={STEPS:06d}" in path)
        left -= moment == "any file" or ended
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    from calibadv.cli.main import main as calibadv

    return calibadv(arguments)


# A retrieval service


class Service:
    """A retrieval server on this machine that can be taken away, and may refuse queries.

    Args:
        refused: whether a query is answered 422.
    """

    def __init__(self, refused: Callable[[str], bool] = lambda query: False) -> None:
        self.retriever = BM25(corpus="embedded", top_k=2)
        self.refused = refused
        self.port = 0
        self.answers = threading.Event()
        self.answers.set()
        self.open()

    def open(self) -> None:
        """Listen, on the same port as before."""
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                wanted = parse_request(self.rfile.read(int(self.headers["Content-Length"])), 2, 10**6, 100)
                service.answers.wait()
                bad = any(map(service.refused, wanted.queries))
                found = {"error": "a query cannot be answered"}
                if not bad:
                    found = render_results(service.retriever.search(wanted.queries, wanted.top_k), True)
                self.send_response(422 if bad else 200)
                self.end_headers()
                self.wfile.write(json.dumps(found).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Be gone: connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    @property
    def words(self) -> tuple[str, ...]:
        """The options of a run that searches here."""
        url = f"http://127.0.0.1:{self.port}/retrieve"
        return ("--config", "retrievers/remote", "--model.retriever.url", url, "--model.retriever.top_k", "2")


def wait_for(path: Path) -> None:
    """Wait until a run has written a file."""
    while not path.exists():
        time.sleep(0.005)


def outages(root: Path) -> Iterator[tuple[str, str, bool]]:
    """Take the server away for some seconds, in a step and in the validation behind step 3."""
    service = Service()
    assert fit(root, "whole", *service.words)[0] == 0
    expected = sums(root / "whole")
    for seconds in (5, 20, 90):
        for where, step in (("in step 3", 2), ("in the validation behind step 3", 3)):
            run = f"outage-{seconds}-{step}"
            process = start(fit_command(root, run, *service.words))
            wait_for(root / run / "rollouts" / f"train-step-{step:06d}.jsonl")
            service.close()
            time.sleep(seconds)
            service.open()
            output, _ = process.communicate()
            waits = [line for line in output.splitlines() if "wait" in line or "back" in line]
            found = differences(expected, sums(root / run)) if process.returncode == 0 else output.splitlines()[-1]
            lines = f"{len(waits)} lines of waiting, {found}"
            yield f"gone for {seconds} s {where}", lines, found == "identical" and len(waits) == 2


def failures(root: Path) -> Iterator[tuple[str, str, bool]]:
    """Refuse a share of the queries."""
    for percent in (1, 20, 100):
        service = Service(lambda query, limit=percent: blake2b(query.encode()).digest()[0] * 100 < limit * 256)
        run = f"failures-{percent}"
        status, output = fit(root, run, *service.words)
        service.close()
        checkpoints = RunFolder(root / run).step_checkpoints()
        failed = sum(
            json.loads(line)["status"] == "search_failed"
            for path in sorted((root / run / "rollouts").glob("train-*.jsonl"))
            for line in path.read_text().splitlines()
        )
        said = next((line for line in output.splitlines() if "error:" in line), "")[:60]
        found = (
            f"status {status}, {failed} rollouts without a result, last checkpoint {checkpoints[-1].stem[-6:]} {said}"
        )
        yield f"{percent} % of the queries fail", found, status == (2 if percent == 100 else 0) and bool(checkpoints)


def sigterm(root: Path) -> Iterator[tuple[str, str, bool]]:
    """Ask a run to stop while it waits for the server, which is gone or accepts and does not answer."""
    service = Service()
    assert fit(root, "whole", *service.words)[0] == 0
    for case, run in (("SIGTERM while it waits", "gone"), ("SIGTERM while a search hangs", "hangs")):
        process = start(fit_command(root, run, *service.words))
        wait_for(root / run / "rollouts/train-step-000003.jsonl")
        assert process.stdout is not None
        if run == "gone":
            service.close()
            next(line for line in process.stdout if "wait" in line)
        else:
            service.answers.clear()
            time.sleep(5)
        began = time.monotonic()
        process.terminate()
        process.communicate()
        seconds = time.monotonic() - began
        checkpoints = [path.stem[-1] for path in RunFolder(root / run).step_checkpoints()]
        if run == "gone":
            service.open()
        service.answers.set()
        status, output = fit(root, run, *service.words, *AUTO)
        found = differences(sums(root / "whole"), sums(root / run)) if status == 0 else output.splitlines()[-1]
        text = f"status {process.returncode} after {seconds:.1f} s, checkpoints {', '.join(checkpoints)}; then {found}"
        yield case, text, process.returncode == 143 and found == "identical"


# A full disk


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """Mount a disk in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def disk(root: Path) -> Iterator[tuple[str, str, bool]]:
    """Let the disk be full at a later and later write, and go on with a larger one."""
    assert fit(root, "whole")[0] == 0
    expected = sums(root / "whole")
    for kilobytes in (4, 12, 24, 60, 100, 200, 2000, 5000, 7000, 9000, 10400, 12000):
        folder = root / f"disk-{kilobytes}"
        with small_disk(folder, kilobytes):
            status, output = fit(folder, "run")
            lines = [line for line in output.splitlines() if line.startswith("calibadv: error:")]
            left = [path.name for path in folder.rglob("*.partial")]
            trace = "Traceback" in output
            subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
            again, told = fit(folder, "run", *AUTO)
            found = differences(expected, sums(folder / "run")) if again == 0 else told.strip().splitlines()[-1]
            good = status == 2 and len(lines) == 1 and not left and not trace and found == "identical"
            said = lines[0].removeprefix("calibadv: error: ")[:100] if lines else output.strip().splitlines()[-1][:100]
            good = good or (status == 0 and found == "identical")
            yield (
                f"{kilobytes} kB",
                f"status {status}: {said.replace(str(folder), '')}{' TRACE' * trace}; {found}",
                good,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
