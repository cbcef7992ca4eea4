"""Time and memory of a training step, by stage: one table in one run, a process of its own for each row.

python -m tools.bench.step.bench --threads 2 --shapes tiny small --precision 32-true bf16-mixed
python -m tools.bench.step.bench --threads 2 --memory --shapes mini --message 12 --observation 12
python -m tools.bench.step.bench --shapes 0.5B 3B --engines transformers vllm --precision bf16-mixed --checkpointing

The first row trains the embedded policy through the command line. The others are models of a shape with random
weights, in the very code of a training step without the Lightning trainer: every message searches, lengths vary, and
every second rollout counts as right. Calibration is evidence, packing into tensors, advantages and calibrators.
The second table, of --memory, is the peak of one update for more and more rollouts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from calibadv.cli.main import main as calibadv
from tools.bench.step.case import STAGES, WARM_UP, Bench, Case, medians
from tools.bench.step.random_agent import SHAPES, Episodes, PeakMemory


class StageSeconds(Callback):
    """Write the seconds of every stage of every step into the run folder."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Append one line."""
        output = outputs["output"]
        line = {**output.seconds, "tokens": int(output.batch.loss_mask.sum().item())}
        with (Path(trainer.default_root_dir) / "seconds.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def measure_embedded(case: Case) -> dict[str, float]:
    """Train through the command line, without validation and without a logger."""
    with tempfile.TemporaryDirectory() as folder, PeakMemory("cpu") as memory:
        arguments = ["fit", "--run.root", folder, "--run.name", "bench"]
        for config in case.configs:
            arguments += ["--config", config]
        arguments += ["--model.rollout_steps", str(case.steps + WARM_UP), "--trainer.limit_val_batches", "0"]
        arguments += ["--trainer.logger", "false", "--trainer.callbacks+=tools.bench.step.bench.StageSeconds"]
        status = calibadv(arguments)
        if status:
            raise SystemExit(status)
        lines = (Path(folder) / "bench" / "seconds.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines[WARM_UP:]]
    for step in steps:
        step["calibration"] = step.pop("evidence") + step.pop("advantages")
    return {**medians(steps), "peak": memory.peak}


def run_case(case: Case, threads: int) -> dict[str, float]:
    """Measure one row in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, "-m", "tools.bench.step.bench", "--case", json.dumps(asdict(case))]
    finished = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{case} ended with status {finished.returncode}; see above")
    found: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return found


def _work(text: str) -> None:
    case = Case(**{**(given := json.loads(text)), "episodes": Episodes(**given["episodes"])})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if case.shape == "embedded":
        found = measure_embedded(case)
    else:
        bench = Bench(case, device)
        found = bench.measure_update() if case.update_only else bench.measure()
    Console(soft_wrap=True).print(json.dumps(found), highlight=False, markup=False)


def step_table(cases: list[Case], threads: int) -> Table:
    """Measure all rows."""
    table = Table("model", "engine", "precision", "micro-batch", box=box.MARKDOWN)
    on_gpu = ("MFU", "decoding / limit") if torch.cuda.is_available() else ()
    for column in (*STAGES, "step", "calibration %", "tokens/s", "peak MiB", *on_gpu):
        table.add_column(column, justify="right")
    for case in track(cases, "measuring", console=Console(stderr=True), transient=True):
        found = run_case(case, threads)
        shares = [f"{found['mfu']:.1%}", f"{found['decode']:.1f}"] if "mfu" in found else []
        table.add_row(
            case.shape,
            case.engine,
            case.precision,
            "config's" if case.shape == "embedded" else f"{case.micro_batch_tokens}",
            *(f"{found[stage]:.3f}" for stage in (*STAGES, "step")),
            f"{found['calibration'] / found['step']:.1%}",
            f"{found['tokens'] / found['rollout']:.0f}",
            f"{found['peak'] / 2**20:.0f}",
            *shares,
        )
    return table


def memory_table(case: Case, threads: int) -> Table:
    """Measure one update for more and more rollouts, with several token budgets."""
    table = Table("rollouts", box=box.MARKDOWN)
    budgets = (1024, 8192)
    for budget in budgets:
        table.add_column(f"budget {budget}", justify="right")
    for rollouts in track((64, 256, 1024), "measuring", console=Console(stderr=True), transient=True):
        row = []
        for budget in budgets:
            questions = rollouts // case.group_size
            found = run_case(replace(case, questions=questions, micro_batch_tokens=budget), threads)
            row.append(f"{(found['peak'] - found['before']) / 2**20:.0f}")
        table.add_row(str(rollouts), *row)
    return table


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", default=["quickstart", "calibrators/calibadv"], help="of the first row")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["tiny"], help="of the other rows")
    parser.add_argument("--engines", nargs="+", choices=["transformers", "vllm"], help="those that are installed")
    parser.add_argument("--precision", nargs="+", choices=["32-true", "bf16-mixed"], default=["32-true"])
    parser.add_argument("--micro_batch_tokens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--questions", type=int, default=4, help="of a step, with five rollouts each")
    parser.add_argument("--message", type=int, default=24, help="mean tokens of a message; four messages a rollout")
    parser.add_argument("--observation", type=int, default=60, help="tokens of an observation")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--steps", type=int, default=3, help="steps to measure, after two to warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch")
    parser.add_argument("--memory", action="store_true", help="measure the memory of the update instead")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        _work(options.case)
        return
    console = Console()
    console.width = max(console.width, 160)
    episodes = Episodes(message=options.message, observation=options.observation)
    common = Case("tiny", steps=options.steps, questions=options.questions, episodes=episodes)
    common = replace(common, checkpointing=options.checkpointing)
    if options.memory:
        for shape in options.shapes:
            case = replace(common, shape=shape, group_size=4, update_only=True)
            console.print(memory_table(case, options.threads))
            console.print(
                f"Peak MiB of an update beyond what was held before it: {shape}, rollouts of {episodes.tokens} tokens",
                highlight=False,
            )
    else:
        engines = options.engines or ["transformers", *(["vllm"] if find_spec("vllm") else [])]
        cases = [replace(common, shape="embedded", configs=tuple(options.config), steps=max(options.steps, 10))]
        cases += [
            replace(common, shape=shape, engine=engine, precision=precision, micro_batch_tokens=budget)
            for shape in options.shapes
            for engine in engines
            for precision in options.precision
            for budget in options.micro_batch_tokens
        ]
        console.print(step_table(cases, options.threads))
        console.print(f"Median seconds; {options.questions} x 5 rollouts of {episodes.tokens} tokens", highlight=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    console.print(f"{device}, {os.cpu_count()} cores, {options.threads} threads", highlight=False)


if __name__ == "__main__":
    main()
