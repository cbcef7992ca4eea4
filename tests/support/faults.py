"""Faults for runs in tests: an error at a chosen place of a chosen rollout step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from calibadv.errors import RetrievalError, UserError

ERRORS: dict[str, Callable[[], Exception]] = {
    "user": lambda: UserError("a mistake; mend it"),
    "retrieval": lambda: RetrievalError("a server is in trouble"),
    "bug": lambda: ZeroDivisionError("a bug"),
    "memory": lambda: MemoryError("out of memory: tried to allocate 64 GiB"),
    "disk": lambda: OSError(28, "No space left on device", "here/file"),
}


class Fault(Callback):
    """Raise an error once, or end the process at once, when a rollout step reaches a place.

    Args:
        step: which rollout step.
        place: ``search``, ``score``, ``estimate``, ``logprobs``, ``backward`` (of the first mini-batch), ``update`` (of
            the second one), ``curves``, ``rollouts`` (their file), ``callback`` or ``validation`` (behind that step);
            or else ``weights`` (which are not finite after the step) or ``folder`` (which is removed).
        error: one of ``ERRORS``, or ``kill``.
        rank: of the process; all by default.
    """

    def __init__(self, step: int, place: str, error: str = "user", rank: int | None = None) -> None:
        self.step = step
        self.rank = rank
        self.place = place
        self.error = error

    def fail(self, *_: Any, **__: Any) -> Any:
        if self.error == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ERRORS[self.error]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.rollout_step + 1 != self.step or self.rank not in (None, trainer.global_rank):
            return
        targets = {
            "search": (pl_module.agent.environment.tools[0].retriever, "search"),
            "score": (pl_module.sampler.reward, "score"),
            "estimate": (pl_module.estimator, "estimate"),
            "logprobs": (pl_module, "correct"),
            "backward": (pl_module, "manual_backward"),
            "curves": (trainer.logger, "log_metrics"),
            "validation": (pl_module, "validation_step"),
        }
        if self.place in targets:
            owner, name = targets[self.place]
            setattr(owner, name, self.fail)
        elif self.place == "update":
            (optimizer,) = trainer.optimizers
            step = optimizer.step

            def first_only(*arguments: Any, **options: Any) -> Any:
                optimizer.step = self.fail
                return step(*arguments, **options)

            optimizer.step = first_only
        elif self.place == "folder":
            # A rename, since another thread writes curves into the folder meanwhile.
            Path(trainer.default_root_dir).rename(f"{trainer.default_root_dir}-removed")
        elif self.place == "rollouts":
            # A folder in the place of the file.
            folder = Path(trainer.default_root_dir) / "rollouts" / f"train-step-{self.step:06d}.jsonl"
            (folder / "x").mkdir(parents=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.place == "callback" and pl_module.rollout_step == self.step:
            self.fail()
        if self.place == "weights" and pl_module.rollout_step == self.step:
            with torch.no_grad():
                next(pl_module.parameters()).view(-1)[7] = torch.nan
