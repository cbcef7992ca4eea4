"""One side of bench.py: TRL's GRPOTrainer, run by the Python of TRL's own environment, a step per line of input.

The folder holds the model, and prompts.json with a list of texts. Each step answers with a line of JSON: its seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tools.bench.trl.steps import answer, side_parser, wait


class StepByStep(TrainerCallback):
    """Wait for a line before each step, and tell how long it took."""

    started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait."""
        wait()
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answer."""
        answer(time.perf_counter() - self.started)


def by_place(group: int, completions: list[Any]) -> list[float]:
    """Give the completions of a group the rewards 0, 1, 2 and so on."""
    return [float(place % group) for place in range(len(completions))]


def train(folder: Path, options: argparse.Namespace) -> None:
    """Train until the input ends."""
    texts = json.loads((folder / "prompts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # TRL needs an end of sequence. The model cannot draw this one, so that all completions have their full length.
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as output:
        settings = trl.GRPOConfig(
            output_dir=output,
            per_device_train_batch_size=len(texts) * options.group,
            num_generations=options.group,
            max_completion_length=options.tokens,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_steps=10**6,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: by_place(options.group, completions),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=tokenizer,
            callbacks=[StepByStep()],
        )
        versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
        answer(versions)
        trainer.train()


def main() -> None:
    """Read the options."""
    parser = side_parser(__doc__.splitlines()[0])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.folder, options)


if __name__ == "__main__":
    main()
