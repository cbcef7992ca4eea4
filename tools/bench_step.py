"""Where the time of a training step goes: seconds per stage, as one table.

python tools/bench_step.py --steps 20 --threads 2 --config quickstart calibrators/calibadv
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table

from calibadv.cli.main import main as calibadv

_WARM_UP = 2


class StageSeconds(Callback):
    """Write the seconds of every stage of every step into the run folder."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Append one line."""
        with (Path(trainer.default_root_dir) / "seconds.jsonl").open("a") as file:
            file.write(json.dumps(outputs["output"].seconds) + "\n")


def measure(configs: list[str], steps: int, threads: int) -> list[dict[str, float]]:
    """Train for some steps and collect the seconds of each stage, without those of the first steps."""
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["fit", "--run.root", folder, "--run.name", "bench"]
        for config in configs:
            arguments += ["--config", config]
        arguments += ["--model.rollout_steps", str(steps + _WARM_UP), "--trainer.limit_val_batches", "0"]
        arguments += ["--trainer.logger", "false", "--trainer.callbacks+=bench_step.StageSeconds"]
        status = calibadv(arguments)
        if status:
            raise SystemExit(status)
        lines = (Path(folder) / "bench" / "seconds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[_WARM_UP:]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", default=["quickstart", "calibrators/calibadv"], help="configs, in order")
    parser.add_argument("--steps", type=int, default=20, help="steps to measure, after two to warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch")
    options = parser.parse_args()
    steps = measure(options.config, options.steps, options.threads)
    total = statistics.median(sum(step.values()) for step in steps)
    table = Table("stage", "median s", "share", title=f"{options.steps} steps, {options.threads} threads")
    for stage in steps[0]:
        seconds = statistics.median(step[stage] for step in steps)
        table.add_row(stage, f"{seconds:.4f}", f"{seconds / total:.1%}")
    table.add_row("step", f"{total:.4f}", "100.0%")
    console = Console()
    console.print(table)
    console.print(f"{' '.join(options.config)} on {platform.machine()}, {os.cpu_count()} cores", highlight=False)


if __name__ == "__main__":
    main()
