"""Checkpoints counted in rollout steps, and an orderly stop when the process is told to end."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console

from calibadv.run_folder import RunFolder


class RolloutCheckpoint(Callback):
    """Write checkpoints into the run folder: every so many rollout steps, at the end, and when told to stop.

    The first Ctrl-C or SIGTERM ends the run after the rollout step in progress, so that the checkpoint is one that an
    uninterrupted run would have passed through; a second one ends it at once.

    Args:
        every_n_rollout_steps: Write ``rollout-step=NNNNNN.ckpt`` after every so many rollout steps.
        keep: How many of them to keep, the newest; 0 keeps all. ``last.ckpt`` is beside them.
    """

    def __init__(self, every_n_rollout_steps: int = 20, keep: int = 2) -> None:
        if every_n_rollout_steps < 1:
            raise ValueError(f"checkpoint.every_n_rollout_steps is {every_n_rollout_steps}; it must be at least 1")
        if keep < 0:
            raise ValueError(f"checkpoint.keep is {keep}; it must be at least 0 (0 keeps all)")
        self.every_n_rollout_steps = every_n_rollout_steps
        self.keep = keep
        self.stopped_by: signal.Signals | None = None
        self._saved_step = -1
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Listen for signals, in the place of Lightning, which would stop in the middle of a step."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopped_by is not None:
                raise KeyboardInterrupt
            self.stopped_by = signal.Signals(number)
            trainer.should_stop = True
            Console(stderr=True).print(
                f"\n{self.stopped_by.name}: finishing rollout step {pl_module.rollout_step + 1}, then saving; "
                "once more to stop at once"
            )

        self._saved_step = pl_module.rollout_step
        self._handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save when it is due; where a validation is due too, after it, so that a resumed run need not repeat it."""
        validates = pl_module.rollout_step % trainer.val_check_interval == 0
        if trainer.should_stop or (self._is_due(pl_module) and not validates):
            self._save(trainer, pl_module)
        if self.stopped_by and not validates:
            trainer.limit_val_batches = 0  # whoever sends SIGTERM will not wait for a validation that is not due

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save when it is due."""
        if trainer.state.fn == "fit" and pl_module.rollout_step and (trainer.should_stop or self._is_due(pl_module)):
            self._save(trainer, pl_module)

    def _is_due(self, pl_module: Any) -> bool:
        return bool(pl_module.rollout_step % self.every_n_rollout_steps == 0)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save what is not yet saved, and give the signals back."""
        if pl_module.rollout_step > self._saved_step:
            self._save(trainer, pl_module)
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _save(self, trainer: Trainer, pl_module: Any) -> None:
        folder = RunFolder(Path(trainer.default_root_dir))
        path = folder.checkpoint(pl_module.rollout_step)
        partial = path.with_suffix(".partial")
        trainer.save_checkpoint(partial, weights_only=False)
        partial.replace(path)
        self._saved_step = pl_module.rollout_step
        _link(path, folder.checkpoints / "last.ckpt")
        if self.keep:
            for old in sorted(folder.checkpoints.glob("rollout-step=*.ckpt"))[: -self.keep]:
                old.unlink()


def _link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, at no cost where the file system can; atomically in any case."""
    partial = target.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:  # no hard links here
        shutil.copyfile(source, partial)
    partial.replace(target)
