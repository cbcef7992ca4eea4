"""The run folder: paths of a run's config, curves, checkpoints, rollouts and results, and its preparation."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from calibadv.errors import UserError
from calibadv.io.files import create_durably, remove, replace_durably, write_atomically

STUDY_FILE = "study.json"  # in the folder of a study, above its run folders
_STEP = re.compile(r"step[-=](\d+)")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of ``rollout-step=000060.ckpt`` and ``last.ckpt``."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The newest checkpoint, under a fixed name."""
        return self.checkpoints / "last.ckpt"

    @property
    def rollouts(self) -> Path:
        """Folder of ``train-step-000010.jsonl`` and the like."""
        return self.path / "rollouts"

    @property
    def results(self) -> Path:
        """File of the figures of every validation, with the settings, versions and machine."""
        return self.path / "results.json"

    @property
    def holds_study(self) -> bool:
        """True for the folder of a study, which is not that of a run."""
        return (self.path / STUDY_FILE).exists()

    @property
    def holds_run(self) -> bool:
        """True once a run has been started here."""
        return any(self.path.glob("config*.yaml"))

    def config(self, resumed_from: int | None) -> Path:
        """File of the resolved config."""
        return self.path / ("config.yaml" if resumed_from is None else f"config-resume-{resumed_from:06d}.yaml")

    def newest_config(self) -> Path:
        """File of the config since the last resume."""
        return max(self.path.glob("config-resume-*.yaml"), default=self.config(None))

    def create(self, config: str) -> None:
        """Create the folder of a run that starts from nothing, with its config; refuse if another run has it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            create_durably(self.config(None), config)
        except FileExistsError as error:
            raise UserError(f"{self.path} holds a run already; choose another --run.name") from error
        except OSError as error:
            raise UserError(
                f"run folder '{self.path}' cannot be written to ({error.strerror}); choose another --run.root"
            ) from error

    def checkpoint(self, step: int) -> Path:
        """File, or folder if it is sharded, of the checkpoint of a rollout step."""
        return self.checkpoints / f"rollout-step={step:06d}.ckpt"

    def rollout_file(self, split: str, step: int) -> Path:
        """File of the rollouts of a split and rollout step."""
        return self.rollouts / f"{split}-step-{step:06d}.jsonl"

    def nonfinite_step(self, step: int) -> Path:
        """File of the mini-batch whose gradient was not finite, which stopped the run."""
        return self.path / f"nonfinite-step-{step:06d}.pt"

    def checkpoints_newest_first(self) -> list[Path]:
        """Return the checkpoints that a run can be resumed from."""
        found = self.step_checkpoints()[::-1]
        if self.last.exists() and not any(self.last.samefile(path) for path in found):
            found.insert(1, self.last)
        return found

    def work_without_checkpoint(self) -> str | None:
        """Name what an attempt that ended before its first checkpoint cannot have left."""
        if self.is_finished:
            return f"the results of a finished run ({self.results.name})"
        evaluated = (path for split in ("test", "predict") for path in self.rollouts.glob(f"{split}-*.jsonl"))
        trained = sorted(self.rollouts.glob("train-*.jsonl"))
        every = self._checkpoint_interval()
        beyond = (path for path in trained if every is not None and step_of(path) > every)
        found = next(evaluated, None) or next(beyond, None)
        return None if found is None else f"rollouts ({found.name})"

    def _checkpoint_interval(self) -> int | None:
        settings = yaml.safe_load(self.newest_config().read_text("utf-8"))
        every = settings.get("checkpoint", {}).get("every_n_rollout_steps") if isinstance(settings, dict) else None
        return every if isinstance(every, int) else None

    def step_checkpoints(self) -> list[Path]:
        """Return the checkpoints named by their rollout step, the oldest first."""
        return sorted(self.checkpoints.glob("rollout-step=*.ckpt"))

    def link_last(self, checkpoint: Path) -> None:
        """Make ``last.ckpt`` a link to a checkpoint, or a copy on file systems without links."""
        if self.last.exists() and self.last.samefile(checkpoint):
            return
        partial = self.last.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        try:
            if checkpoint.is_dir():
                partial.symlink_to(checkpoint.name)
            else:
                try:
                    os.link(checkpoint, partial)
                except OSError:  # no hard links here
                    shutil.copyfile(checkpoint, partial)
            replace_durably(partial, self.last)
        finally:
            partial.unlink(missing_ok=True)

    @property
    def is_finished(self) -> bool:
        """True if the run has ended and all its files are written."""
        return bool(self.read_results().get("finished", False))

    def reopen(self) -> None:
        """Record that the run is not finished any more: what is left of it may be killed before it writes results."""
        if self.is_finished:
            write_atomically(self.results, json.dumps({**self.read_results(), "finished": False}, indent=2) + "\n")

    def clear(self) -> None:
        """Remove the files of an attempt that ended before its first checkpoint; other files stay."""
        for pattern in ("config*.yaml", "events.*", "results.json", "guard.json", "*.partial"):
            for path in self.path.glob(pattern):
                remove(path)
        for folder in (self.rollouts, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)

    def read_results(self) -> dict[str, Any]:
        """Read ``results.json``; empty if there is none."""
        try:
            content: Any = json.loads(self.results.read_text("utf-8")) if self.results.exists() else {}
            return dict(content)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"'{self.results}' is damaged ({error}); remove it: a resumed run writes it again"
            ) from error

    def truncate_after(self, step: int) -> None:
        """Remove partial files, and the files of later steps, which a resumed run writes again."""
        written = [*self.rollouts.glob("train-*.jsonl"), *self.rollouts.glob("val-*.jsonl"), *self.step_checkpoints()]
        written += self.path.glob("config-resume-*.yaml")
        for path in written:
            if step_of(path) > step:
                remove(path)
        for folder in (self.path, self.rollouts, self.checkpoints):
            for path in folder.glob("*.partial"):
                remove(path)


@dataclass(frozen=True, slots=True)
class StartPoint:
    """The folder of a run and the checkpoint that it starts from.

    Attributes:
        folder: of the run.
        checkpoint: to start from, or None.
        resumed_from: rollout steps done at the checkpoint, None for a run that starts from nothing.
        starts_over: True if the folder holds an attempt that ended before its first checkpoint, to be replaced.
    """

    folder: RunFolder
    checkpoint: Path | None = None
    resumed_from: int | None = None
    starts_over: bool = False


def step_of(path: Path) -> int:
    """Return the rollout step in a file's name, or -1."""
    found = _STEP.search(path.name)
    return int(found[1]) if found else -1
