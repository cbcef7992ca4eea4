"""Checkpoints counted in rollout steps, and an orderly stop when the process is told to end."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.console import Console
from typing_extensions import override

from calibadv.distributed import raised_by_all
from calibadv.errors import RollbackError, StopRequestedError, UserError, one_line
from calibadv.io.files import remove, replace_durably
from calibadv.runs.checkpoints import CheckpointFile, write_digests
from calibadv.runs.folder import RunFolder
from calibadv.training.optimization import find_non_finite


class RolloutCheckpoint(Callback):
    """Write checkpoints into the run folder: every so many rollout steps, at the end, and when told to stop.

    The first Ctrl-C or SIGTERM ends the run after the rollout step in progress, so that the checkpoint is one that an
    uninterrupted run would have passed through; a second one ends it at once.

    An error ends the run too: the last finished step is saved where the weights are still those of it, which is not so
    while an update is under way.

    Args:
        every_n_rollout_steps: Write ``rollout-step=NNNNNN.ckpt`` after every so many rollout steps.
        keep: How many of them to keep, the newest; 0 keeps all. ``last.ckpt`` is beside them.
    """

    def __init__(self, every_n_rollout_steps: int = 20, keep: int = 2) -> None:
        if every_n_rollout_steps < 1:
            raise UserError(f"checkpoint.every_n_rollout_steps is {every_n_rollout_steps}; it must be at least 1")
        if keep < 0:
            raise UserError(f"checkpoint.keep is {keep}; it must be at least 0 (0 keeps all)")
        self.every_n_rollout_steps = every_n_rollout_steps
        self.keep = keep
        self.stopped_by: signal.Signals | None = None
        self.kept = ""
        self.saved = True  # False once an error has cost finished steps
        self._started = False
        self._saved_step = -1
        self._file = CheckpointFile()
        self._handlers: dict[signal.Signals, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = self._file

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        # A run that is stopped before its first step is saved too, so that the way to continue is always the same.
        self._saved_step = pl_module.rollout_step or -1
        self._started = True

        def stop(number: int, frame: FrameType | None) -> None:
            console = Console(stderr=True, soft_wrap=True)
            if self.stopped_by is not None:
                console.print("stopped at once: the step in progress is lost, the last checkpoint stands")
                raise SystemExit(128 + number)
            self.stopped_by = signal.Signals(number)
            pl_module.stop_requested = True
            if pl_module.processes.size == 1:  # several agree first: one that stops alone leaves the others waiting
                trainer.should_stop = True
            doing = "the validation" if trainer.validating else f"rollout step {pl_module.rollout_step + 1}"
            unless = ", unless it waits for the retriever" if doing != "the validation" else ""
            text = f"{self.stopped_by.name}: finishing {doing}{unless}, then saving; once more to stop at once"
            console.print(text, highlight=False)

        self._handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["callbacks"].pop(Timer().state_key, None)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.finished_step = pl_module.rollout_step
        if self._all_stop(trainer, pl_module):
            # Whoever sends SIGTERM will not wait for a validation; a resumed run makes up for it where it was due.
            self._save(trainer, pl_module)
            trainer.limit_val_batches = 0
        elif self._is_due(trainer, pl_module) and not self._validates(trainer, pl_module):
            self._save(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._all_stop(trainer, pl_module)
        in_training = trainer.state.fn == "fit" and pl_module.rollout_step > 0
        if in_training and self._is_due(trainer, pl_module) and self._validates(trainer, pl_module):
            self._save(trainer, pl_module)

    def _all_stop(self, trainer: Trainer, pl_module: Any) -> bool:
        """Whoever was told to stop by now, all processes stop."""
        number = pl_module.processes.all_reduce_max(self.stopped_by or 0)
        if number:
            self.stopped_by = signal.Signals(number)
            trainer.should_stop = True
        return bool(number)

    def _is_due(self, trainer: Trainer, pl_module: Any) -> bool:
        return trainer.should_stop or bool(pl_module.rollout_step % self.every_n_rollout_steps == 0)

    def _validates(self, trainer: Trainer, pl_module: Any) -> bool:
        return sum(trainer.num_val_batches) > 0 and bool(pl_module.validation_is_due(pl_module.rollout_step))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.rollout_step > self._saved_step:
            self._save(trainer, pl_module)
        self._restore_handlers()

    @override
    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        breaks = isinstance(exception, Exception) and not isinstance(exception, RollbackError)
        if self._started and breaks and trainer.state.fn == "fit":
            if isinstance(exception, StopRequestedError):
                self.stopped_by = self.stopped_by or signal.SIGTERM  # another process has received it
            self.kept = self._rescue(trainer, pl_module, exception)
        self._restore_handlers()

    def _rescue(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> str:
        """Save what can be saved, and say what is kept and what is lost."""
        step = pl_module.finished_step
        if pl_module.mid_update:
            reason = f"the update of rollout step {step + 1} was under way"
        elif step != pl_module.rollout_step:
            reason = f"rollout step {pl_module.rollout_step} was not written out"
        elif pl_module.processes.size > 1 and not raised_by_all(exception):
            reason = "the processes did not stop together"
        else:
            reason = self._save_at_the_end(trainer, pl_module, exception)
        self.saved = not reason
        if self.saved:
            return f"rollout step {step}, the last one that was finished, is saved"
        stands = next(iter(RunFolder(Path(trainer.default_root_dir)).checkpoints_newest_first()), None)
        if stands is None:
            return f"nothing is saved, since {reason}; there is no checkpoint, and {_steps(step)} lost"
        return f"nothing is saved, since {reason}; {stands.name} stands, and {_steps(step - self._saved_step)} lost"

    def _save_at_the_end(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> str:
        """Save, in the middle of whatever Lightning was doing; returns why that is not possible."""
        if self._saved_step == pl_module.rollout_step:
            return ""
        rewind(trainer, pl_module.rollout_step)
        try:
            self._save(trainer, pl_module)
        except Exception as error:  # the first one is what is reported
            again = "" if str(error) == str(exception) else f" ({one_line(error)})"
            return f"the checkpoint cannot be written{again}"
        return ""

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _save(self, trainer: Trainer, pl_module: Any) -> None:
        folder = RunFolder(Path(trainer.default_root_dir))
        path = folder.checkpoint(pl_module.rollout_step)
        partial = path.with_suffix(".partial")
        for logger in trainer.loggers:
            logger.save()  # points that a resumed run will not write again
        try:
            self._write(trainer, pl_module, partial)
            _agree(self._file.failure if trainer.is_global_zero else None, path, pl_module)
            _agree(self._put_in_place(folder, partial, path) if trainer.is_global_zero else None, path, pl_module)
        finally:
            if trainer.is_global_zero and partial.exists():
                remove(partial)
        self._saved_step = pl_module.rollout_step

    def _put_in_place(self, folder: RunFolder, partial: Path, path: Path) -> str | None:
        """Give a written checkpoint its names, and remove old ones; returns why that is not possible."""
        try:
            replace_durably(partial, path)
            folder.link_last(path)
            for old in folder.step_checkpoints()[: -self.keep] if self.keep else ():
                remove(old)
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _write(self, trainer: Trainer, pl_module: Any, partial: Path) -> None:
        """Write a checkpoint, unless training has diverged."""
        names = pl_module.processes.gather(find_non_finite(pl_module.model, trainer.optimizers[0]))
        if name := next(filter(None, names), None):
            raise UserError(
                f"the checkpoint of rollout step {pl_module.rollout_step} is not written, since {name} is not finite: "
                "training has diverged; resume from the last checkpoint with a lower model.learning_rate"
            )
        trainer.save_checkpoint(partial, weights_only=False)
        if partial.is_dir():
            write_digests(partial, pl_module.processes)


def _agree(failure: str | None, checkpoint: Path, pl_module: Any) -> None:
    """Raise on all processes the failure of the one that writes."""
    failures = [told for told in pl_module.processes.gather(failure) if told]
    if failures:
        raise UserError(
            f"the checkpoint of rollout step {pl_module.rollout_step} cannot be written to {checkpoint.parent} "
            f"({failures[0]}); make room there"
        )


def rewind(trainer: Trainer, rollout_steps: int) -> None:
    """Set Lightning's counters to the end of a rollout step, where an exception left them in the middle of another.

    A resume counts on from them; they say when the next validation is due.
    """
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress
    done = progress.current.ready - (progress.total.ready - rollout_steps)
    for counts, value in ((progress.total, rollout_steps), (progress.current, done)):
        counts.ready = counts.started = counts.processed = counts.completed = value
    loop.val_loop.batch_progress.reset()


def _steps(number: int) -> str:
    return "1 rollout step is" if number == 1 else f"{number} rollout steps are"
