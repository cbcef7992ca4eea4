"""Where a run's files go, and what it starts from: decided before anything is loaded."""

from __future__ import annotations

import os
import pickle
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibadv.cli.configs import ConfigFile, Option
from calibadv.errors import UserError
from calibadv.run_folder import RunFolder

_RUN_ROOT = "runs"
# In the environment of a study's runs: what they are started with.
STUDY_WORDS = "CALIBADV_STUDY_WORDS"


@dataclass
class Run:
    """Where the run's files go: ``<root>/<name>/``."""

    root: str = _RUN_ROOT
    """Folder of all runs."""
    name: str | None = None
    """Name of this run; by default made of the configs' names, the seed and the time."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run's files go, and what it starts from.

    ``resumed_from`` is the rollout step of the checkpoint, None for a run that starts from nothing.
    """

    folder: RunFolder
    checkpoint: Path | None = None
    resumed_from: int | None = None


def plan_start(root: str, name: str | None, default_name: str, ckpt_path: str | None) -> Start:
    """Decide where a run's files go, and read from where it resumes.

    The checkpoint of a run continues in that run's folder, unless another name is given.

    Args:
        root: folder of all runs.
        name: of this run, None for the checkpoint's or else the default one.
        default_name: for a run without name or checkpoint.
        ckpt_path: a checkpoint, ``last``, or None.

    Returns:
        The plan; nothing is written yet.

    Raises:
        UserError: there is no such checkpoint, it is not one of ours, or the folder cannot be written.
    """
    named = RunFolder(Path(root) / name) if name else None
    if ckpt_path is None:
        return Start(_writable(named or RunFolder(Path(root) / default_name)))
    if ckpt_path == "last" and named is None:
        raise UserError("--ckpt_path last: name the run to resume with --run.name (its folder under --run.root)")
    checkpoint = named.newest_checkpoint() if named and ckpt_path == "last" else Path(ckpt_path)
    step = read_rollout_step(checkpoint)
    folder = named or owner(checkpoint) or RunFolder(Path(root) / default_name)
    return Start(_writable(folder), checkpoint, step)


def owner(checkpoint: Path) -> RunFolder | None:
    """The run that a checkpoint belongs to.

    Args:
        checkpoint: a file.

    Returns:
        The folder of the run, None for a checkpoint outside of a run's ``checkpoints`` folder.
    """
    folder = checkpoint.parent if checkpoint.parent.name else checkpoint.absolute().parent
    return RunFolder(folder.parent) if folder.name == "checkpoints" else None


def read_rollout_step(checkpoint: Path) -> int:
    """Read how many rollout steps were done at a checkpoint.

    Args:
        checkpoint: a file, or the folder of a sharded one.

    Returns:
        Rollout steps.

    Raises:
        UserError: there is no such file, or it is not a checkpoint of a run.
    """
    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint  # what Lightning writes of a sharded one
    if not file.is_file():
        raise UserError(f"--ckpt_path {checkpoint} is not a file; give a checkpoint, or 'last' with --run.name")
    try:
        content: Any = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
        return int(content["rollout_step"])
    except (RuntimeError, OSError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"--ckpt_path {checkpoint} is not a checkpoint of a calibadv run; give a file of a run's checkpoints "
            "folder, or 'last' with --run.name"
        ) from error


def refuse_in_study(folder: RunFolder) -> None:
    """Refuse to train inside the folder of a study, whose runs only the study starts.

    Args:
        folder: of the run.

    Raises:
        UserError: it lies there, and no study has started this process.
    """
    owner = next((path for path in folder.path.absolute().parents[:2] if RunFolder(path).holds_study), None)
    if owner is not None and STUDY_WORDS not in os.environ:
        raise UserError(
            f"{folder.path} lies in the folder of a study; its own command continues it: choose another --run.root"
        )


def refuse_second_run(start: Start) -> None:
    """Refuse to train in the folder of another run.

    Args:
        start: as planned.

    Raises:
        UserError: the folder holds a run, and the checkpoint is not of it.
    """
    folder = start.folder
    own = owner(start.checkpoint) if start.checkpoint else None
    if not folder.holds_run or (own is not None and own.path.resolve() == folder.path.resolve()):
        return
    own_settings = [ConfigFile(str(folder.newest_config()), folder.newest_config(), {})]
    command = resume_command("fit", own_settings, folder)
    resume = f"resume it with '{command}'" if folder.last.exists() else "it has no checkpoint: remove the folder"
    raise UserError(f"{folder.path} holds a run already; {resume}, or choose another --run.name")


def refuse_untrained(start: Start, verb: str) -> None:
    """Refuse to evaluate the policy as it was before training in the folder of a run.

    Args:
        start: as planned.
        verb: ``validate``, ``test`` or ``predict``.

    Raises:
        UserError: the folder holds a run, and there is no checkpoint to evaluate.
    """
    if start.checkpoint is None and start.folder.holds_run:
        raise UserError(
            f"{start.folder.path} holds a run, and without a checkpoint {verb} evaluates the policy before training; "
            "add --ckpt_path last, or choose another --run.name"
        )


def resume_command(verb: str, settings: Sequence[ConfigFile | Option], folder: RunFolder) -> str:
    """What to type to go on with a run.

    Args:
        verb: the command.
        settings: of the command line.
        folder: of the run.

    Returns:
        A line for a shell, in the same working directory.
    """
    words = [verb]
    for setting in settings:
        if isinstance(setting, ConfigFile):
            words += ["--config", setting.name]
        elif setting.name not in ("--run.root", "--run.name", "--ckpt_path"):
            words += setting.words
    if folder.path.parent != Path(_RUN_ROOT):
        words += ["--run.root", str(folder.path.parent)]
    return shlex.join(["calibadv", *words, "--run.name", folder.path.name, "--ckpt_path", "last"])


def _writable(folder: RunFolder) -> RunFolder:
    if folder.holds_study:
        raise UserError(f"{folder.path} is the folder of a study, and not of a run; choose another --run.name")
    existing = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"run folder '{folder.path}': {existing} cannot be written to; choose another --run.root")
    return folder
