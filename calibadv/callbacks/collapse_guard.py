"""Watches a run for the beginning of a collapse."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from calibadv.batch import StepOutput
from calibadv.callbacks._collapse.detector import Alarm, Watch
from calibadv.callbacks._collapse.rules import Limits
from calibadv.callbacks._utils import installed, writers
from calibadv.callbacks.checkpoint import RolloutCheckpoint
from calibadv.callbacks.rollout_writer import write_training_rollouts
from calibadv.errors import RollbackError, UserError
from calibadv.io.files import replace_durably, write_atomically
from calibadv.runs.folder import RunFolder, step_of
from calibadv.types import Metrics

log = logging.getLogger(__name__)

Event = dict[str, Any]
_FILE = "guard.json"


class CollapseGuard(Callback):
    """Watch for the beginning of a collapse; say so, keep the rollouts, and warn, stop, or go back and train slower.

    What it saw and did stands in results.json and in guard.json of the run folder.

    Args:
        action: What to do: only ``warn``; ``stop`` in an orderly way with a checkpoint; or ``rollback`` to the last
            healthy checkpoint, go on from there with a lower learning rate, and stop where that is not possible.
        limits: What counts as the beginning of a collapse.
        rate_factor: A rollback multiplies the learning rate by this.
        max_rollbacks: After so many rollbacks of a run, the next alarm stops it.
    """

    def __init__(
        self,
        action: Literal["warn", "stop", "rollback"] = "warn",
        limits: Limits | None = None,
        rate_factor: float = 0.5,
        max_rollbacks: int = 2,
    ) -> None:
        if not 0 < rate_factor < 1:
            raise UserError(f"the guard's rate_factor is {rate_factor}; it must be above 0 and below 1")
        if max_rollbacks < 1:
            raise UserError(f"the guard's max_rollbacks is {max_rollbacks}; it must be at least 1, or action be stop")
        self.action = action
        self.limits = limits or Limits()
        self.rate_factor = rate_factor
        self.max_rollbacks = max_rollbacks
        self.events: list[Event] = []
        self._watch = Watch(self.limits)
        self._latest: StepOutput | None = None
        self.stopping = False

    @property
    def rollbacks(self) -> list[Event]:
        """The events that sent the run back, in order."""
        return [event for event in self.events if event["back_to"] is not None]

    @property
    def slowed(self) -> float:
        """The factor of the learning rate, after the rollbacks so far."""
        factor: float = math.prod(event["rate_factor"] for event in self.rollbacks)
        return factor

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"watch": self._watch.state_dict(), "events": self.events}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._watch.load_state_dict(state_dict["watch"])
        self.events = list(state_dict["events"])

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self.action != "rollback" or stage != "fit":
            return
        if trainer.world_size > 1:
            raise UserError(
                "CollapseGuard's action is rollback, which begins again in the same process, and there are "
                f"{trainer.world_size} processes; give action stop, and resume with a lower rate"
            )
        checkpoints = installed(trainer, RolloutCheckpoint)
        if checkpoints is None or checkpoints.keep == 0:
            return
        unsure = max(self.limits.patience, int(trainer.val_check_interval) - 1)  # steps since the last healthy value
        least = math.ceil(unsure / checkpoints.every_n_rollout_steps) + 1
        if checkpoints.keep < least:
            raise UserError(
                f"checkpoint.keep is {checkpoints.keep}, and the guard may notice a collapse {unsure} steps late, by "
                f"which time no healthy checkpoint is kept; set it to at least {least}, or 0 to keep all"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.stopping = False
        folder = RunFolder(Path(trainer.default_root_dir))
        self.events = pl_module.processes.gather(_events_until(folder, pl_module.rollout_step, self.events))[0]
        self._write(trainer, folder)
        pl_module.lr_factor = self.slowed
        for event in self.rollbacks[-1:]:
            if event["back_to"] == pl_module.rollout_step:
                self._show(trainer, f"{event['text']}; training goes on from here", pl_module.rollout_step)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._latest = None

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._latest = outputs["output"]
        self._plot(pl_module)
        self._look(trainer, pl_module, outputs["output"].metrics)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer, pl_module, {f"val/{name}": value for name, value in pl_module.evaluation.items()})

    @override
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._latest = None

    def _look(self, trainer: Trainer, pl_module: Any, metrics: Metrics) -> None:
        # Processes see equal curves up to rounding; the first one decides for all.
        alarms: list[Alarm] = pl_module.processes.gather(self._watch.observe(metrics, pl_module.rollout_step))[0]
        if not alarms or self.stopping:  # whatever the last validation shows has the same cause
            return
        folder = RunFolder(Path(trainer.default_root_dir))
        serious = [alarm for alarm in alarms if alarm.acts]
        healthy = self._checkpoint_before(folder, serious)
        self.stopping = bool(serious) and self.action != "warn" and healthy is None
        trainer.should_stop = trainer.should_stop or self.stopping
        self._record(trainer, alarms, None if healthy is None else step_of(healthy))
        self._plot(pl_module)
        self._keep_rollouts(trainer, folder)
        if healthy is not None:
            self._roll_back(trainer, folder, healthy, pl_module.rollout_step)
        self._write(trainer, folder)

    def _keep_rollouts(self, trainer: Trainer, folder: RunFolder) -> None:
        if trainer.is_global_zero and self._latest is not None:
            write_training_rollouts(folder.rollout_file("train", self._latest.step), self._latest)

    def _plot(self, pl_module: Any) -> None:
        pl_module.log_at_step({"guard/alarms": float(len(self.events))})

    def _checkpoint_before(self, folder: RunFolder, serious: list[Alarm]) -> Path | None:
        """The checkpoint to go back to; None where there is no reason, no checkpoint or no more patience."""
        if self.action != "rollback" or not serious or len(self.rollbacks) >= self.max_rollbacks:
            return None
        until = min(alarm.healthy_until for alarm in serious)
        return max((path for path in folder.step_checkpoints() if step_of(path) <= until), key=step_of, default=None)

    def _record(self, trainer: Trainer, alarms: Sequence[Alarm], back_to: int | None) -> None:
        step = alarms[0].step
        text = f"rollout step {step}: {', and '.join(map(str, alarms))}; {self._what_follows(back_to)}"
        if trainer.is_global_zero:
            log.warning("CollapseGuard: %s", text)
        self._show(trainer, text, step)
        self.events.append(
            {
                "step": step,
                "curves": {alarm.curve: {"value": alarm.value, "limit": alarm.limit} for alarm in alarms},
                "text": text,
                "stops": self.stopping,
                "back_to": back_to,
                "rate_factor": None if back_to is None else self.rate_factor,
            }
        )

    def _what_follows(self, back_to: int | None) -> str:
        if back_to is not None:
            factor = self.slowed * self.rate_factor
            return f"going back to rollout step {back_to}, on with {factor:.3g} times the learning rate asked for"
        if not self.stopping:
            return "training goes on"
        if self.action == "stop":
            return "stopping"
        spent = len(self.rollbacks) >= self.max_rollbacks
        return f"stopping, {'max_rollbacks is reached' if spent else 'there is no healthy checkpoint to go back to'}"

    def _roll_back(self, trainer: Trainer, folder: RunFolder, checkpoint: Path, step: int) -> None:
        """Leave the folder as a resume from that checkpoint needs it, and end this attempt."""
        rollouts = folder.rollout_file("train", step)
        if rollouts.exists():
            replace_durably(rollouts, _free_name(folder.rollout_file("alarm", step)))  # which no resume removes
        folder.truncate_after(step_of(checkpoint))
        folder.link_last(checkpoint)
        self._write(trainer, folder)
        checkpoints = installed(trainer, RolloutCheckpoint)
        told = (checkpoints and checkpoints.stopped_by) or 0
        if told:  # whoever wants the run to end would wait for what the rollback begins
            raise SystemExit(128 + told)
        raise RollbackError(checkpoint)

    def _write(self, trainer: Trainer, folder: RunFolder) -> None:
        path = folder.path / _FILE
        if trainer.is_global_zero and (self.events or path.exists()):
            write_atomically(path, json.dumps({"events": self.events}, indent=2) + "\n")

    def _show(self, trainer: Trainer, text: str, step: int) -> None:
        for writer in writers(trainer):
            writer.add_text("guard/why", text, step)


def _free_name(path: Path) -> Path:
    """The path, or with a number behind its name where an earlier alarm has taken it."""
    names = (path if number == 1 else path.with_stem(f"{path.stem}-{number}") for number in count(1))
    return next(name for name in names if not name.exists())


def _events_until(folder: RunFolder, step: int, own: list[Event]) -> list[Event]:
    """Return the events before a resume: those of the checkpoint, and what sent the run back to it afterwards."""
    events = _read_events(folder)
    last = max((place for place, event in enumerate(events) if event["back_to"] == step), default=None)
    return own if last is None else events[: last + 1]


def stops_of_guard(folder: RunFolder) -> list[int]:
    """Read when a guard has stopped a run."""
    return [event["step"] for event in _read_events(folder) if event["stops"]]


def _read_events(folder: RunFolder) -> list[Event]:
    path = folder.path / _FILE
    if not path.exists():
        return []
    try:
        events: list[Event] = json.loads(path.read_text(encoding="utf-8"))["events"]
        if all({"step", "back_to", "stops"} <= event.keys() for event in events):
            return events
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise UserError(f"'{path}' is damaged; copy it again, or remove it: the guard then knows nothing of its stops")
