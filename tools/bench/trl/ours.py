"""The other side of bench.py: SearchAgentModule under a Lightning trainer, a step per line of input.

The folder holds the model, and prompts.json with a list of texts. Each step answers with a line of JSON: its seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from calibadv.batch import RolloutBatch
from calibadv.engines import TransformersEngine
from calibadv.interfaces import AdvantageEstimator
from calibadv.losses import PPOClip
from calibadv.module import SearchAgentModule
from calibadv.numerics.advantages import group_normalise
from calibadv.protocol.search import SearchProtocol
from calibadv.retrieval import MemoryRetriever
from calibadv.rewards import F1
from calibadv.types import Question
from tools.bench.trl.steps import answer, side_parser, wait


class StepByStep(Callback):
    """Wait for a line before each step, and tell how long it took, as a whole and by stage."""

    started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Wait."""
        wait()
        self.started = time.perf_counter()

    def on_train_batch_end(self, _: Any, __: Any, outputs: Any, *___: Any) -> None:
        """Answer."""
        stages = outputs["output"].seconds
        answer({**stages, "step": time.perf_counter() - self.started})


class ByPlace(AdvantageEstimator):
    """GRPO's advantages of the rewards 0, 1, 2 and so on: a random model earns none that differ."""

    def estimate(self, batch: RolloutBatch) -> Tensor:
        """Normalise within groups."""
        rewards = torch.tensor([float(rollout.sample) for rollout in batch.rollouts])
        return group_normalise(rewards, batch.group_ids, batch.included)[:, None] * batch.loss_mask


class SameQuestions(IterableDataset[list[Question]]):
    """The same questions at every step."""

    def __init__(self, texts: list[str]) -> None:
        self.questions = [Question(str(place), text, ["none"]) for place, text in enumerate(texts)]

    def __iter__(self) -> Iterator[list[Question]]:
        """Yield them without end."""
        while True:
            yield self.questions


def train(folder: Path, options: argparse.Namespace) -> None:
    """Train until the input ends."""
    (folder / "template.txt").write_text("{question}")
    module = SearchAgentModule(
        policy=str(folder),
        engine=TransformersEngine(),
        retriever=MemoryRetriever([], {}, top_k=1),
        reward=F1(),
        estimator=ByPlace(),
        loss=PPOClip(),
        protocol=SearchProtocol(
            False, str(folder / "template.txt"), "never", max_searches=1, max_turn_tokens=options.tokens
        ),
        rollout_steps=10**6,
        group_size=options.group,
        learning_rate=options.learning_rate,
        micro_batch_tokens=options.micro_batch_tokens,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision=options.precision,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StepByStep()],
    )
    versions = {name: version(name) for name in ("calibadv", "transformers", "torch")}
    answer(versions)
    texts = json.loads((folder / "prompts.json").read_text())
    trainer.fit(module, DataLoader(SameQuestions(texts), batch_size=None))


def main() -> None:
    """Read the options."""
    parser = side_parser(__doc__.splitlines()[0])
    parser.add_argument("--precision", required=True)
    parser.add_argument("--micro-batch-tokens", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.folder, options)


if __name__ == "__main__":
    main()
