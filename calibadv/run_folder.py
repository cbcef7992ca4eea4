"""The run folder: where a run's config, curves, checkpoints, rollouts and results lie, and how it is resumed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibadv.errors import UserError

STUDY_FILE = "study.json"  # in the folder of a study; run folders lie below it
_STEP = re.compile(r"step[-=](\d+)")
# What systems say that cannot open a folder, or cannot be told to write something to disk now.
_UNABLE = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}


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
        """Where the resolved config is saved.

        Args:
            resumed_from: rollout steps done at the checkpoint, None for a run that starts from nothing.

        Returns:
            ``config.yaml``, or ``config-resume-<step>.yaml``.
        """
        return self.path / ("config.yaml" if resumed_from is None else f"config-resume-{resumed_from:06d}.yaml")

    def newest_config(self) -> Path:
        """Where the config of the last part of this run is saved.

        Returns:
            That of the last resume, or of the start.
        """
        return max(self.path.glob("config-resume-*.yaml"), default=self.config(None))

    def claim(self, config: str) -> None:
        """Make this the folder of a run that starts from nothing, and of no other.

        Args:
            config: the resolved config, which is the first file of a run.

        Raises:
            UserError: another run has been started here, perhaps a moment ago; or the folder cannot be written.
        """
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
        """Where the checkpoint of a rollout step is saved.

        Args:
            step: rollout steps done.

        Returns:
            A path under ``checkpoints``.
        """
        return self.checkpoints / f"rollout-step={step:06d}.ckpt"

    def rollout_file(self, split: str, step: int) -> Path:
        """Where rollouts are written.

        Args:
            split: ``train``, ``val``, ``test`` or ``predict``.
            step: rollout step.

        Returns:
            A path under ``rollouts``.
        """
        return self.rollouts / f"{split}-step-{step:06d}.jsonl"

    def nonfinite_step(self, step: int) -> Path:
        """Where the mini-batch is written that stopped a run because its gradient was not finite.

        Args:
            step: rollout step.

        Returns:
            ``nonfinite-step-000012.pt`` and the like. A resume leaves it, as it is about what went wrong.
        """
        return self.path / f"nonfinite-step-{step:06d}.pt"

    def checkpoints_newest_first(self) -> list[Path]:
        """The checkpoints that a run can go on from.

        Returns:
            ``rollout-step=`` files from the highest step down. ``last.ckpt`` follows the first of them, but for the
            usual case that it is the same file as one of them. Empty where there is none.
        """
        found = self.step_checkpoints()[::-1]
        if self.last.exists() and not any(self.last.samefile(path) for path in found):
            found.insert(1, self.last)
        return found

    def step_checkpoints(self) -> list[Path]:
        """The checkpoints that are named by their rollout step.

        Returns:
            Complete ones, in the order of their steps.
        """
        return sorted(self.checkpoints.glob("rollout-step=*.ckpt"))

    def point_last_at(self, checkpoint: Path) -> None:
        """Make ``last.ckpt`` the same as another checkpoint, at no cost where the file system can.

        Args:
            checkpoint: a complete checkpoint; sharded ones are folders, and get a symbolic link.
        """
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

    def clear(self) -> None:
        """Remove what an attempt has left that ended before its first checkpoint; files that are not ours stay."""
        for pattern in ("config*.yaml", "events.*", "results.json", "guard.json", "*.partial"):
            for path in self.path.glob(pattern):
                remove(path)
        for folder in (self.rollouts, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)

    def read_results(self) -> dict[str, Any]:
        """Read what earlier parts of this run recorded.

        Returns:
            The content of ``results.json``, or an empty dictionary.

        Raises:
            UserError: the file is damaged.
        """
        try:
            content: Any = json.loads(self.results.read_text("utf-8")) if self.results.exists() else {}
            return dict(content)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"'{self.results}' is damaged ({error}); remove it: a resumed run writes it again"
            ) from error

    def drop_beyond(self, step: int) -> None:
        """Remove rollout files and checkpoints that a resumed run will write again, and what an earlier one left over.

        Args:
            step: rollout steps done at the checkpoint.
        """
        written = [*self.rollouts.glob("train-*.jsonl"), *self.rollouts.glob("val-*.jsonl"), *self.step_checkpoints()]
        written += self.path.glob("config-resume-*.yaml")  # of an attempt of which nothing remains
        for path in written:
            if step_of(path) > step:
                remove(path)
        for folder in (self.path, self.rollouts, self.checkpoints):
            for path in folder.glob("*.partial"):
                remove(path)


def step_of(path: Path) -> int:
    """Read a rollout step off a file's name.

    Args:
        path: such as ``rollout-step=000060.ckpt`` or ``train-step-000010.jsonl``.

    Returns:
        Rollout steps done; -1 where the name does not say.
    """
    found = _STEP.search(path.name)
    return int(found[1]) if found else -1


def remove(path: Path) -> None:
    """Remove a file, or the folder that a sharded checkpoint is.

    Args:
        path: what to remove; of a link, the link.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_atomically(path: Path, text: str, partial: Path | None = None) -> None:
    """Write a text file whole or not at all, also where the power fails.

    Args:
        path: where to; folders are made.
        text: what to write.
        partial: where to write it first, on the same disk; beside ``path`` by default.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial or path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        replace_durably(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_durably(partial: Path, path: Path) -> None:
    """Rename what is written to its place, so that after a power cut it is complete there, or was never there.

    Without this the name may reach the disk before the content does.

    Args:
        partial: file, folder or symbolic link.
        path: on the same disk; a file there is replaced.

    Raises:
        OSError: the content cannot be written to the disk, or the place not be taken.
    """
    for written in (*partial.rglob("*"), partial):
        if not written.is_symlink():
            _sync(written)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk, if the system can do so."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise


def _create(path: Path, text: str) -> None:
    """Write a text file that must not be there yet, and nothing of it where that fails."""
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            _sync(path)
            _sync(path.parent)
        except OSError:
            path.unlink()
            raise
