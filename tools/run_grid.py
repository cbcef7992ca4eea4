"""Train three arms over seeds and learning rates, everything else equal, and print the table of docs/results.md.

    python tools/run_grid.py --out runs/grid

Two runs at a time with one thread each. Stopped and started again, it keeps finished runs and repeats the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import track

from calibadv.outcome import outcome

ARMS = {
    "grpo": ["quickstart", "protocols/no_prepend"],
    "grpo_prepend": ["quickstart"],
    "calibadv": ["quickstart", "calibrators/calibadv"],
}


def train(out: Path, arm: str, rate: str, seed: int, steps: int) -> None:
    """Train one run in a process of its own, unless it is there already."""
    name = f"{arm}-{rate}-{seed}"
    results = out / name / "results.json"
    if results.exists() and json.loads(results.read_text())["rollout_step"] == steps:
        return
    shutil.rmtree(out / name, ignore_errors=True)
    command = [sys.executable, "-m", "calibadv.cli.main", "fit"]
    for config in ARMS[arm]:
        command += ["--config", config]
    command += ["--run.root", str(out), "--run.name", name, "--seed_everything", str(seed)]
    command += ["--model.learning_rate", rate, "--model.rollout_steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = out / f"{name}.log"
    with log.open("w") as file:
        status = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise SystemExit(f"{name} ended with status {status}; see {log}")


def table(out: Path, rates: list[str], seeds: list[int]) -> str:
    """One line per rate and arm, as Markdown."""
    lines = [
        "| learning rate | arm | final F1 by seed | mean | best F1, mean | collapsed |",
        "|---|---|---|---|---|---|",
    ]
    for rate, arm in product(rates, ARMS):
        files = [out / f"{arm}-{rate}-{seed}" / "results.json" for seed in seeds]
        runs = [outcome(json.loads(file.read_text())["validations"]) for file in files]
        finals = " ".join(f"{run['final_f1']:.2f}" for run in runs)
        mean, best = (statistics.fmean(run[key] for run in runs) for key in ("final_f1", "best_f1"))
        collapsed = sum(run["collapsed"] for run in runs)
        lines.append(f"| {rate} | {arm} | {finals} | {mean:.2f} | {best:.2f} | {collapsed:.0f} of {len(runs)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/grid"), help="folder of the runs")
    parser.add_argument("--rates", nargs="+", default=["3e-4", "6e-4"], help="learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="seeds")
    parser.add_argument("--steps", type=int, default=100, help="rollout steps of each run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = list(product(options.rates, options.seeds, ARMS))
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(train, options.out, arm, rate, seed, options.steps) for rate, seed, arm in runs]
        for future in track(waiting, description="runs"):
            future.result()
    Console().print(table(options.out, options.rates, options.seeds), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
