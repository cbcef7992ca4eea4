"""The run folder: where a run's config, curves, checkpoints, rollouts and results lie, and how it is resumed."""

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
from calibadv.io.files import _create, remove, replace_durably, write_atomically

STUDY_FILE = "study.json"  # in the folder of a study; run folders lie below it
_STEP = re.compile(r"step[-=](\d+)")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run's folder; a method per thing that lies in it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of ``rollout-step=000060.ckpt`` and ``last.ckpt``."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The newest checkpoint once more, under a name that does not change."""
        return self.checkpoints / "last.ckpt"

    @property
    def rollouts(self) -> Path:
        """Folder of ``train-step-000010.jsonl`` and the like."""
        return self.path / "rollouts"

    @property
    def results(self) -> Path:
        """File of the figures of every validation, and what they were made with."""
        return self.path / "results.json"

    @property
    def holds_study(self) -> bool:
        """Whether this is the folder of a study, and so of no run."""
        return (self.path / STUDY_FILE).exists()

    @property
    def holds_run(self) -> bool:
        """Whether a run has been started here."""
        return any(self.path.glob("config*.yaml"))

    def config(self, resumed_from: int | None) -> Path:
        """Where the resolved config is saved."""
        return self.path / ("config.yaml" if resumed_from is None else f"config-resume-{resumed_from:06d}.yaml")

    def newest_config(self) -> Path:
        """Where the config of the last part of this run is saved."""
        return max(self.path.glob("config-resume-*.yaml"), default=self.config(None))

    def claim(self, config: str) -> None:
        """Make this the folder of a run that starts from nothing, and of no other."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _create(self.config(None), config)
        except FileExistsError as error:
            raise UserError(f"{self.path} holds a run already; choose another --run.name") from error
        except OSError as error:
            raise UserError(
                f"run folder '{self.path}' cannot be written to ({error.strerror}); choose another --run.root"
            ) from error

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a rollout step is saved."""
        return self.checkpoints / f"rollout-step={step:06d}.ckpt"

    def rollout_file(self, split: str, step: int) -> Path:
        """Where rollouts are written."""
        return self.rollouts / f"{split}-step-{step:06d}.jsonl"

    def nonfinite_step(self, step: int) -> Path:
        """Where the mini-batch is written that stopped a run because its gradient was not finite."""
        return self.path / f"nonfinite-step-{step:06d}.pt"

    def checkpoints_newest_first(self) -> list[Path]:
        """The checkpoints that a run can go on from."""
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
        """The checkpoints that are named by their rollout step."""
        return sorted(self.checkpoints.glob("rollout-step=*.ckpt"))

    def point_last_at(self, checkpoint: Path) -> None:
        """Make ``last.ckpt`` the same as another checkpoint, at no cost where the file system can."""
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
        """Whether the run has come to its end, with everything written."""
        return bool(self.read_results().get("finished", False))

    def reopen(self) -> None:
        """Record that the run is not finished any more: what is left of it may be killed before it writes results."""
        if self.is_finished:
            write_atomically(self.results, json.dumps({**self.read_results(), "finished": False}, indent=2) + "\n")

    def clear(self) -> None:
        """Remove what an attempt has left that ended before its first checkpoint; files that are not ours stay."""
        for pattern in ("config*.yaml", "events.*", "results.json", "guard.json", "*.partial"):
            for path in self.path.glob(pattern):
                remove(path)
        for folder in (self.rollouts, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)

    def read_results(self) -> dict[str, Any]:
        """Read what earlier parts of this run recorded."""
        try:
            content: Any = json.loads(self.results.read_text("utf-8")) if self.results.exists() else {}
            return dict(content)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"'{self.results}' is damaged ({error}); remove it: a resumed run writes it again"
            ) from error

    def drop_beyond(self, step: int) -> None:
        """Remove rollout files and checkpoints beyond a step, which a resumed run writes again, and partial files."""
        written = [*self.rollouts.glob("train-*.jsonl"), *self.rollouts.glob("val-*.jsonl"), *self.step_checkpoints()]
        written += self.path.glob("config-resume-*.yaml")  # of an attempt of which nothing remains
        for path in written:
            if step_of(path) > step:
                remove(path)
        for folder in (self.path, self.rollouts, self.checkpoints):
            for path in folder.glob("*.partial"):
                remove(path)


def step_of(path: Path) -> int:
    """Read a rollout step off a file's name."""
    found = _STEP.search(path.name)
    return int(found[1]) if found else -1
