"""Where a run's files go, and what it starts from: decided before anything is loaded."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calibadv.callbacks.collapse_guard import stops_of_guard
from calibadv.config.files import ConfigFile, Option
from calibadv.config.trainer_checks import is_first_process, job_name
from calibadv.errors import UserError
from calibadv.runs.checkpoints import damage, read_content
from calibadv.runs.folder import RunFolder, step_of
from calibadv.runs.setup import Start

log = logging.getLogger(__name__)

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


def locate(root: str, name: str | None, default_name: str, ckpt_path: str | None) -> RunFolder:
    """Decide where a run's files go. The checkpoint of a run continues in that run's folder, unless a name is given."""
    if name is not None:
        return _writable(RunFolder(Path(root) / name))
    if ckpt_path == "last":
        raise UserError("--ckpt_path last: name the run to resume with --run.name (its folder under --run.root)")
    if ckpt_path == "auto" and job_name() is None:
        raise UserError("--ckpt_path auto: name the run with --run.name, so that the next attempt finds this one")
    named = ckpt_path not in (None, "auto")
    return _writable((owner(Path(str(ckpt_path))) if named else None) or RunFolder(Path(root) / default_name))


def plan_start(folder: RunFolder, ckpt_path: str | None) -> Start:
    """Decide what a run starts from, and check it."""
    if ckpt_path is None:
        return Start(folder)
    if ckpt_path not in ("last", "auto"):
        _check_whole(Path(ckpt_path))
        return _start_from(Path(ckpt_path), folder)
    candidates = folder.checkpoints_newest_first()
    if ckpt_path == "last" and not candidates:
        raise UserError(_no_checkpoint(folder))
    if ckpt_path == "auto" and _stopped_by_guard(folder, candidates) and not folder.is_finished:
        candidates = candidates[1:]  # killed before it could say so: it does its last part again
    if candidates:
        return _start_from(_newest_whole(candidates), folder)
    if folder.holds_run and (work := folder.work_without_checkpoint()):
        raise UserError(
            f"{folder.path} has no checkpoint, but {work}, which a new start would remove; copy a checkpoint back to "
            f"{folder.checkpoints}, or choose another --run.name"
        )
    return Start(folder, starts_over=folder.holds_run)


def _stopped_by_guard(folder: RunFolder, candidates: Sequence[Path]) -> bool:
    """Whether the newest checkpoint is the one with which a guard has stopped the run."""
    return bool(candidates) and step_of(candidates[0]) in stops_of_guard(folder)[-1:]


def _start_from(checkpoint: Path, folder: RunFolder) -> Start:
    return Start(folder, checkpoint, read_content(checkpoint)["rollout_step"])


def _newest_whole(candidates: Sequence[Path]) -> Path:
    """The first checkpoint that is not damaged; names those that are."""
    found: list[str] = []
    for checkpoint in candidates:
        reason = damage(checkpoint)
        if reason is not None:
            found.append(f"{checkpoint}: {reason}")
            continue
        if found and is_first_process():
            lost = step_of(candidates[0]) - int(read_content(checkpoint)["rollout_step"])
            log.warning(
                "damaged checkpoints are passed over (%s); %s is used instead, %d rollout step%s earlier",
                "; ".join(found),
                checkpoint,
                lost,
                "" if lost == 1 else "s",
            )
        return checkpoint
    raise UserError(
        f"every checkpoint of the run is damaged ({'; '.join(found)}); copy one again, or remove the folder and start "
        "again without --ckpt_path"
    )


def _check_whole(checkpoint: Path) -> None:
    if not checkpoint.exists():
        raise UserError(f"--ckpt_path {checkpoint} is not a file; give a checkpoint, or 'last' with --run.name")
    reason = damage(checkpoint)
    if reason is None:
        return
    own = owner(checkpoint)
    others = [path for path in (own.checkpoints_newest_first() if own else []) if not path.samefile(checkpoint)]
    whole = next((path for path in others if damage(path) is None), None)
    remedy = "give a file of a run's checkpoints folder" if whole is None else f"{whole} is whole: give that"
    raise UserError(
        f"--ckpt_path {checkpoint} is not a checkpoint of a calibadv run, or is damaged ({reason}); {remedy}"
    )


def _no_checkpoint(folder: RunFolder) -> str:
    remedy = "name the run to resume with --run.name, or start one without --ckpt_path"
    if folder.holds_run:
        remedy = "the run ended before its first: --ckpt_path auto starts it anew"
    return f"--ckpt_path last: there is no checkpoint in {folder.checkpoints}; {remedy}"


def owner(checkpoint: Path) -> RunFolder | None:
    """The run that a checkpoint belongs to."""
    folder = checkpoint.parent if checkpoint.parent.name else checkpoint.absolute().parent
    return RunFolder(folder.parent) if folder.name == "checkpoints" else None


def refuse_in_study(folder: RunFolder) -> None:
    """Refuse to train inside the folder of a study, whose runs only the study starts."""
    owner = next((path for path in folder.path.absolute().parents[:2] if RunFolder(path).holds_study), None)
    if owner is not None and STUDY_WORDS not in os.environ:
        raise UserError(
            f"{folder.path} lies in the folder of a study; its own command continues it: choose another --run.root"
        )


def refuse_second_run(start: Start) -> None:
    """Refuse to train in the folder of another run."""
    folder = start.folder
    own = owner(start.checkpoint) if start.checkpoint else None
    if start.starts_over or not folder.holds_run or (own and own.path.resolve() == folder.path.resolve()):
        return
    settings = [ConfigFile(str(folder.newest_config()), folder.newest_config(), {})]
    has_checkpoint = bool(folder.checkpoints_newest_first())
    command = resume_command("fit", settings, folder, "last" if has_checkpoint else "auto")
    remedy = "resume it" if has_checkpoint else "it has no checkpoint: start it anew"
    raise UserError(f"{folder.path} holds a run already; {remedy} with '{command}', or choose another --run.name")


class FinishedError(Exception):
    """A run that is put into the queue again has nothing left to do."""


def check_left_to_do(start: Start, rollout_steps: int, ckpt_path: str) -> None:
    """Tell apart what is left of a run to train, or to write, and what is finished."""
    done = start.resumed_from
    if done is None:
        return
    results = start.folder.read_results()
    finished = start.folder.is_finished and results.get("rollout_step") == done and _is_own(start)
    if ckpt_path == "auto" and finished and (done >= rollout_steps or stops_of_guard(start.folder)[-1:] == [done]):
        why = "" if done >= rollout_steps else ", where its guard stopped it; --ckpt_path last goes on"
        raise FinishedError(f"{start.folder.path} is finished at rollout step {done}{why}")
    if done > rollout_steps or (done == rollout_steps and finished):
        raise UserError(
            f"nothing is left to do: the checkpoint holds {done} rollout steps and model.rollout_steps is "
            f"{rollout_steps}; raise it to go on"
        )


def _is_own(start: Start) -> bool:
    """Whether the checkpoint belongs to the folder of the run, as far as its place tells."""
    own = owner(start.checkpoint) if start.checkpoint else None
    return own is None or own.path.resolve() == start.folder.path.resolve()


def refuse_untrained(start: Start, verb: str) -> None:
    """Refuse to evaluate the policy as it was before training in the folder of a run."""
    if start.checkpoint is None and start.folder.holds_run:
        raise UserError(
            f"{start.folder.path} holds a run, and without a checkpoint {verb} evaluates the policy before training; "
            "add --ckpt_path last, or choose another --run.name"
        )


def resume_command(
    verb: str, settings: Sequence[ConfigFile | Option], folder: RunFolder, ckpt_path: str = "last"
) -> str:
    """What to type to go on with a run."""
    words = [verb]
    for setting in settings:
        if isinstance(setting, ConfigFile):
            words += ["--config", setting.name]
        elif setting.name not in ("--run.root", "--run.name", "--ckpt_path"):
            words += setting.words
    if folder.path.parent != Path(_RUN_ROOT):
        words += ["--run.root", str(folder.path.parent)]
    return shlex.join(["calibadv", *words, "--run.name", folder.path.name, "--ckpt_path", ckpt_path])


def _writable(folder: RunFolder) -> RunFolder:
    if folder.holds_study:
        raise UserError(f"{folder.path} is the folder of a study, and not of a run; choose another --run.name")
    existing = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"run folder '{folder.path}': {existing} cannot be written to; choose another --run.root")
    return folder
