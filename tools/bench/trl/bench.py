"""Seconds per step beside TRL's GRPOTrainer, and of multi-turn rollouts with and without a kept key-value cache.

TRL lives in an environment of its own; the sides are processes that take turns, step by step:

python3 -m venv trl-venv && trl-venv/bin/pip install trl==1.16.0 "torch==2.13.*"
python -m tools.bench.trl.bench --trl-python trl-venv/bin/python --steps 30 --threads 2 --precision 32-true bf16-mixed

Both sides start from one random model (Qwen2 shape, float32), and sample 8 completions of exactly 64 tokens for each
of 8 prompts at temperature 1, without a stop; rewards are 0 to 7 by place. Then comes one step of AdamW. With these
settings TRL computes no old log-probabilities; ours, by default, does, for its curves of entropy and perplexity are
made of them, and so its step has one more forward pass. Both compute entropies, and clip the gradient. Our seconds are
those of a step of the Lightning trainer, from one hook to the other, and TRL's those of the transformers trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tools.bench.step.multi_turn import compare_turns

_GROUP, _PROMPTS, _TOKENS, _VOCABULARY, _LEARNING_RATE = 8, 8, 64, 1024, 1e-6
_WARM_UP = 3


class Side:
    """A process that makes a step when it is told to."""

    def __init__(self, name: str, words: Sequence[str], threads: int) -> None:
        self.name = name
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.versions: dict[str, str] = self._read()

    def step(self) -> Any:
        """Let it make a step, and wait: its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it: its input ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}; run its worker by hand to see why")
        return json.loads(line)


def make_folder(folder: Path) -> None:
    """Save the model, a byte-level tokenizer that fills its vocabulary, and the prompts."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2000)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=["<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(words)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>")
    assert len(tokenizer) == _VOCABULARY
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=_VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    prompts = [" ".join(rng.choices(words, k=8 + place)) for place in range(_PROMPTS)]
    (folder / "prompts.json").write_text(json.dumps(prompts))


def start(folder: Path, options: argparse.Namespace) -> list[Side]:
    """Start TRL, and our side once for each setting."""
    common = [str(folder), "--group", str(_GROUP), "--tokens", str(_TOKENS), "--learning-rate", str(_LEARNING_RATE)]
    common += ["--threads", str(options.threads)]
    sides = [Side("TRL", [options.trl_python, "-m", "tools.bench.trl.worker", *common], options.threads)]
    for precision in options.precision:
        for budget in options.micro_batch_tokens:
            words = [sys.executable, "-m", "tools.bench.trl.ours", *common, "--precision", precision]
            name = f"ours, {precision}, micro_batch_tokens {budget}"
            sides.append(Side(name, [*words, "--micro-batch-tokens", str(budget)], options.threads))
    return sides


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median, and its 95 % interval by the percentile bootstrap."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(np.asarray(ratios), size=(10_000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return statistics.median(ratios), float(low), float(high)


def alternate(sides: list[Side], steps: int) -> list[list[Any]]:
    """Let the sides take turns, another one first every time: for each side the seconds of its steps."""
    seconds: list[list[Any]] = [[] for _ in sides]
    for place in track(range(steps + _WARM_UP), "steps", console=Console(stderr=True), transient=True):
        for offset in range(len(sides)):
            side = (place + offset) % len(sides)
            seconds[side].append(sides[side].step())
    return [column[_WARM_UP:] for column in seconds]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", required=True, help="python of the environment that has TRL")
    parser.add_argument("--steps", type=int, default=30, help=f"steps to measure, after {_WARM_UP} to warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch, on each side")
    parser.add_argument("--precision", nargs="+", default=["32-true"], help="of our trainer; the first is the default")
    parser.add_argument("--micro-batch-tokens", nargs="+", type=int, default=[16384], help="of our update")
    parser.add_argument("--episodes", type=int, default=8, help="multi-turn rollout batches to measure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("step of 64 rollouts x 64 tokens", "median s", "ratio to TRL", "95 %")
    details: list[str] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name))
        sides = start(Path(name), options)
        try:
            trl, *ours = alternate(sides, options.steps)
        finally:
            for side in sides:
                side.close()
        table.add_row("TRL", f"{statistics.median(trl):.3f}", "1", "")
        for side, column in zip(sides[1:], ours, strict=True):
            median, low, high = interval([own["step"] / other for own, other in zip(column, trl, strict=True)])
            seconds = statistics.median(own["step"] for own in column)
            table.add_row(side.name, f"{seconds:.3f}", f"{median:.3f}", f"{low:.3f} to {high:.3f}")
            stages = {stage: statistics.median(own[stage] for own in column) for stage in column[0] if stage != "step"}
            details.append(f"{side.name}: " + ", ".join(f"{stage} {value:.3f}" for stage, value in stages.items()))
        table.add_section()
        turns = compare_turns(Path(name), options.episodes)
        for label, column in turns.items():
            median, low, high = interval([own / other for own, other in zip(column, turns["prefilled"], strict=True)])
            ratio = ("1", "") if label == "prefilled" else (f"{median:.3f} of prefilled", f"{low:.3f} to {high:.3f}")
            table.add_row(f"64 rollouts of up to 4 turns, {label}", f"{statistics.median(column):.3f}", *ratio)
    console = Console()
    console.print(table)
    for line in details:
        console.print(line, highlight=False)
    versions = "; ".join(f"{side.name}: {side.versions}" for side in sides[:2])
    console.print(f"{versions}; {options.threads} threads, {time.perf_counter() - began:.0f} s", highlight=False)


if __name__ == "__main__":
    main()
