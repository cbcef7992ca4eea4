"""Train and evaluate a search agent from Python, with Lightning's Trainer and without the command line."""

from __future__ import annotations

import sys

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from calibadv import QuestionData, SearchAgentModule
from calibadv.calibrators import AnswerRebalance, SoftPenalty
from calibadv.callbacks import AdvantageCalibration
from calibadv.engines import TransformersEngine
from calibadv.estimators import GRPO
from calibadv.losses import PPOClip
from calibadv.protocol import SearchProtocol
from calibadv.retrieval import BM25
from calibadv.rewards import F1


def main(folder: str = "runs/python_api", rollout_steps: int = 10) -> list[dict[str, float]]:
    """Train the embedded policy with CalibAdv, and return its test metrics."""
    module = SearchAgentModule(
        policy="embedded",
        engine=TransformersEngine(),
        reward=F1(),
        estimator=GRPO(),
        loss=PPOClip(),
        retriever=BM25(corpus="embedded", top_k=2),
        protocol=SearchProtocol(template="short", max_searches=3, max_turn_tokens=36, max_rollout_tokens=512),
        rollout_steps=rollout_steps,
        learning_rate=3e-4,
        mini_batches=4,
    )
    data = QuestionData(train="embedded", validation="embedded", test="embedded", validation_questions=20)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=CSVLogger(folder),
        val_check_interval=5,  # rollout steps
        callbacks=[
            AdvantageCalibration([SoftPenalty(), AnswerRebalance()]),
            ModelCheckpoint(monitor="val/f1", mode="max", filename="best"),
        ],
    )
    trainer.fit(module, data)
    return [dict(metrics) for metrics in trainer.test(module, data)]


if __name__ == "__main__":
    main(*sys.argv[1:2])
