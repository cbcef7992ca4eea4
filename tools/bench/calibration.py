"""Seconds of the method itself for a batch of the paper's size: 2,560 rollouts of 2,600 tokens.

python -m tools.bench.calibration --threads 2 --times 5

Evidence is scores, silver documents and step correctness; packing makes tensors of rollouts, which training does
without the method too. The tensor part is the two calibrators, also as a multiple of one clone() of the advantages.
Shares are of the step that ``calibadv plan`` estimates for the shapes of Qwen2.5 on GPUs, with the calibration
on this machine's CPU: an estimate, for no such step was run.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from calibadv.batch import collate
from calibadv.calibrators import AnswerRebalance, SoftPenalty
from calibadv.estimators import GRPO
from calibadv.planning.job import GPUS, PRECISIONS, Job, Sampler
from calibadv.planning.model_shape import empty_model, read_shape
from calibadv.planning.time import step_times
from calibadv.rewards import F1
from calibadv.rewards.evidence import credit_rollouts
from calibadv.rewards.scoring import score_rollouts
from tools.bench.step.random_agent import Episodes, shape_config, written_rollouts

# 200 + 5 x 180 + 4 x 375 = 2,600 tokens; thinks of 110 words.
_EPISODES = Episodes(turns=5, message=180, observation=375, prompt=200)
_GROUP, _THINK, _VOCABULARY = 5, 110, 151936


def timed(function: Callable[[], Any], times: int) -> tuple[float, Any]:
    """Median seconds of a function, and what it returned last; the first call warms up."""
    result = function()
    spent = []
    for _ in range(times):
        del result  # so that its memory can be used again, as in training
        start = time.perf_counter()
        result = function()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent), result


def estimate(shape: str, devices: int, questions: int) -> float:
    """Seconds of a step on H100s with vLLM and bf16, by ``calibadv plan``."""
    sizes = read_shape(empty_model(shape_config(shape)))
    job = Job(
        shape=sizes,
        trained=sizes.parameters,
        gpu=GPUS["h100"],
        precision=PRECISIONS["bf16-mixed"],
        sampler=Sampler("vllm"),
        questions=questions,
        group_size=_GROUP,
        max_rollout_tokens=4096,
        mean_rollout_tokens=_EPISODES.tokens,
        mean_policy_tokens=_EPISODES.turns * _EPISODES.message,
        max_turns=_EPISODES.turns,
        processes=devices,
        sharded=True,
        checkpointing=True,
        mini_batches=10,
    )
    return sum(item.seconds for item in step_times(job))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=512, help="with five rollouts each")
    parser.add_argument("--times", type=int, default=5, help="measure each part so many times")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    written = written_rollouts(options.questions, _GROUP, _EPISODES, _VOCABULARY, _THINK)

    scoring, scored = timed(lambda: score_rollouts(written, F1()), options.times)
    crediting, rollouts = timed(lambda: credit_rollouts(scored), options.times)
    packing, batch = timed(lambda: collate(rollouts), options.times)
    estimating, advantages = timed(lambda: GRPO().estimate(batch), options.times)
    softening, (softened, _) = timed(lambda: SoftPenalty().calibrate(batch, advantages), options.times)
    balancing, _ = timed(lambda: AnswerRebalance().calibrate(batch, softened), options.times)
    copying, _ = timed(advantages.clone, max(options.times, 20))

    table = Table("part", box=box.MARKDOWN)
    for column in ("seconds", "clones"):
        table.add_column(column, justify="right")
    tensors = softening + balancing
    rows = {
        "scores": scoring,
        "silver documents and step correctness": crediting,
        "packing into tensors": packing,
        "advantages": estimating,
        "soft penalty": softening,
        "answer rebalance": balancing,
        "one clone() of the advantages": copying,
        "calibrators together (limit 50 clones)": tensors,
        "calibration: step correctness and calibrators": crediting + tensors,
        "all but the clone": scoring + crediting + packing + estimating + tensors,
    }
    for name, spent in rows.items():
        table.add_row(name, f"{spent:.4f}", f"{spent / copying:.1f}")
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    shares = Table("model", "GPUs", box=box.MARKDOWN)
    for column in ("estimated step s", "calibration", "all of the above"):
        shares.add_column(column, justify="right")
    for shape, devices in (("0.5B", 1), ("0.5B", 8), ("1.5B", 8), ("3B", 8), ("7B", 8)):
        step = estimate(shape, devices, options.questions)
        # Each process scores and credits its own groups; what follows, all do for the whole batch.
        method = crediting / devices + tensors
        everything = method + scoring / devices + packing + estimating
        shares.add_row(shape, str(devices), f"{step:.1f}", f"{method / step:.2%}", f"{everything / step:.2%}")
    console.print(shares)
    size = " x ".join(map(str, advantages.shape))
    console.print(f"{size}; {platform.machine()}, {os.cpu_count()} cores, {options.threads} threads", highlight=False)


if __name__ == "__main__":
    main()
