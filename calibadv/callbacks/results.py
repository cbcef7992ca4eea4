"""results.json: the figures of a run, and what they were made with."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from calibadv.callbacks._utils import installed
from calibadv.callbacks.collapse_guard import CollapseGuard
from calibadv.io.files import write_atomically
from calibadv.runs.folder import RunFolder
from calibadv.runs.summary import summarize_run
from calibadv.runs.versions import machine, versions


class Results(Callback):
    """Write ``results.json`` into the run folder after every validation, test and at the end of training.

    Its state travels in checkpoints, so that the file of a resumed run is that of an uninterrupted one but for times.
    The command that it records is what the user typed.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.validations: list[dict[str, float]] = []
        self.statuses: Counter[str] = Counter()
        self._seconds_before = 0.0
        self._start = time.perf_counter()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations, "statuses": dict(self.statuses), "wall_seconds": self.wall_seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = list(state_dict["validations"])
        self.statuses = Counter(state_dict["statuses"])
        self._seconds_before = state_dict["wall_seconds"]

    @property
    def wall_seconds(self) -> float:
        """Seconds of this run, those before a resume included."""
        return self._seconds_before + time.perf_counter() - self._start

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.statuses.update(str(rollout.status) for rollout in outputs["output"].batch.rollouts)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        row = {"step": pl_module.rollout_step, **pl_module.evaluation}
        self.validations = [*(v for v in self.validations if v["step"] < row["step"]), row]
        if trainer.state.fn == "fit":
            self._write(trainer, pl_module, self._training(trainer, pl_module))
        else:
            self._write(trainer, pl_module, {"validate": {**row, **_diagnosis(pl_module)}})

    @override
    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        row = {"step": pl_module.rollout_step, **pl_module.evaluation}
        self._write(trainer, pl_module, {"test": {**row, **_diagnosis(pl_module)}})

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        figures = self._training(trainer, pl_module)
        finished = pl_module.rollout_step >= pl_module.rollout_steps or figures.get("stopped_by_guard", False)
        self._write(trainer, pl_module, {**figures, "finished": finished})

    def _training(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        guard = installed(trainer, CollapseGuard)
        return {
            "validations": self.validations,
            **summarize_run(self.validations),
            "statuses": dict(sorted(self.statuses.items())),
            **_diagnosis(pl_module),
            **({} if guard is None else {"guard": guard.events, "stopped_by_guard": guard.stopping}),
            "wall_seconds": round(self.wall_seconds, 1),
        }

    def _write(self, trainer: Trainer, pl_module: Any, figures: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        folder = RunFolder(Path(trainer.default_root_dir))
        made_with = {
            "name": folder.path.name,
            "rollout_step": pl_module.rollout_step,
            "seed": pl_module.seed,
            "threads": torch.get_num_threads(),
            "device": str(pl_module.device),
            "versions": versions(),
            "machine": machine(),
            "command": self.command,
        }
        if trainer.state.fn == "fit":
            figures = {**made_with, **figures}
        else:
            figures = {**made_with, **folder.read_results(), **figures}
        write_atomically(folder.results, json.dumps(figures, indent=2) + "\n")


def _diagnosis(pl_module: Any) -> dict[str, Any]:
    """The entry that says why nothing can be learned, where that is so."""
    return {} if pl_module.diagnosis is None else {"diagnosis": pl_module.diagnosis.as_json()}
