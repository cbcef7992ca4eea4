"""Find other callbacks, and TensorBoard's writers."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

C = TypeVar("C", bound=Callback)


def installed(trainer: Trainer, kind: type[C]) -> C | None:
    """Find a callback of the run."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def writers(trainer: Trainer) -> list[Any]:
    """TensorBoard's own writers: only loggers of this kind, and only on the first process."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]
