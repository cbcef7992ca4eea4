"""Run folder and start point, decided and checked before anything is loaded."""

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
from calibadv.runs.folder import RunFolder, StartPoint, step_of

log = logging.getLogger(__name__)

_RUN_ROOT = "runs"
# Environment variable that marks the processes of a study's runs: the words of their command.
STUDY_WORDS = "CALIBADV_STUDY_WORDS"


@dataclass
class RunOptions:
    """Folder of the run: ``<root>/<name>/``."""

    root: str = _RUN_ROOT
    """Folder of all runs."""
    name: str | None = None
    """Name of this run; by default made of the configs' names, the seed and the time."""


def locate(root: str, name: str | None, default_name: str, ckpt_path: str | None) -> RunFolder:
    """Return the run folder: the named one, that of the run of a given checkpoint, or one of the default name."""
    if name is not None:
        return _writable(RunFolder(Path(root) / name))
    if ckpt_path == "last":
        raise UserError("--ckpt_path last: name the run to resume with --run.name (its folder under --run.root)")
    if ckpt_path == "auto" and job_name() is None:
        raise UserError("--ckpt_path auto: name the run with --run.name, so that the next attempt finds this one")
    named = ckpt_path not in (None, "auto")
    return _writable((_owner(Path(str(ckpt_path))) if named else None) or RunFolder(Path(root) / default_name))


def resolve_start(folder: RunFolder, ckpt_path: str | None) -> StartPoint:
    """Return the start point for ``--ckpt_path``, and check its checkpoint."""
    if ckpt_path is None:
        return StartPoint(folder)
    if ckpt_path not in ("last", "auto"):
        _check_whole(Path(ckpt_path))
        return _start_from(Path(ckpt_path), folder)
    candidates = folder.checkpoints_newest_first()
    if ckpt_path == "last" and not candidates:
        raise UserError(_no_checkpoint(folder))
    if ckpt_path == "auto" and _stopped_by_guard(folder, candidates) and not folder.is_finished:
        candidates = folder.step_checkpoints()[-2::-1]  # killed before its end was recorded: repeat the last part
    if candidates:
        return _start_from(_newest_whole(candidates), folder)
    return _start_over(folder) if folder.holds_run else StartPoint(folder)


def _start_over(folder: RunFolder) -> StartPoint:
    if work := folder.work_without_checkpoint():
        raise UserError(
            f"{folder.path} has no checkpoint, but {work}, which a new start would remove; copy a checkpoint back to "
            f"{folder.checkpoints}, or choose another --run.name"
        )
    return StartPoint(folder, starts_over=True)


def _stopped_by_guard(folder: RunFolder, candidates: Sequence[Path]) -> bool:
    """Return True if a guard has stopped the run at its newest checkpoint."""
    return bool(candidates) and step_of(candidates[0]) in stops_of_guard(folder)[-1:]


def _start_from(checkpoint: Path, folder: RunFolder) -> StartPoint:
    return StartPoint(folder, checkpoint, read_content(checkpoint)["rollout_step"])


def _newest_whole(candidates: Sequence[Path]) -> Path:
    """Return the first checkpoint that is not damaged, and warn of those that are."""
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
    own = _owner(checkpoint)
    others = [path for path in (own.checkpoints_newest_first() if own else []) if not path.samefile(checkpoint)]
    whole = next((path for path in others if damage(path) is None), None)
    remedy = "give a file of a run's checkpoints folder" if whole is None else f"{whole} is not damaged: give that"
    raise UserError(
        f"--ckpt_path {checkpoint} is not a checkpoint of a calibadv run, or is damaged ({reason}); {remedy}"
    )


def _no_checkpoint(folder: RunFolder) -> str:
    remedy = "name the run to resume with --run.name, or start one without --ckpt_path"
    if folder.holds_run:
        remedy = "the run ended before its first one: --ckpt_path auto starts it again"
    return f"--ckpt_path last: there is no checkpoint in {folder.checkpoints}; {remedy}"


def _owner(checkpoint: Path) -> RunFolder | None:
    """Return the folder of the run that a checkpoint belongs to."""
    folder = checkpoint.parent if checkpoint.parent.name else checkpoint.absolute().parent
    return RunFolder(folder.parent) if folder.name == "checkpoints" else None


def check_start(verb: str, start: StartPoint, rollout_steps: int | None, ckpt_path: str | None) -> None:
    """Check that a run may start in its folder, and that something is left to do.

    The steps of a run on demonstrations are known only when these are counted; they follow from its other settings.
    """
    if verb == "fit":
        _check_not_in_study(start.folder)
        _check_not_started(start)
        _check_not_done(start, rollout_steps, ckpt_path)
    elif start.checkpoint is None and start.folder.holds_run:
        raise UserError(
            f"{start.folder.path} holds a run, and without a checkpoint {verb} evaluates the policy before training; "
            "add --ckpt_path last, or choose another --run.name"
        )


def _check_not_in_study(folder: RunFolder) -> None:
    in_study = any(RunFolder(path).holds_study for path in folder.path.absolute().parents[:2])
    if in_study and STUDY_WORDS not in os.environ:
        raise UserError(
            f"{folder.path} is inside the folder of a study, which only its own command continues; choose another "
            "--run.root"
        )


def _check_not_started(start: StartPoint) -> None:
    """Check that the folder holds no other run than the one to be continued."""
    folder = start.folder
    if start.starts_over or not folder.holds_run or _run_of(start) == folder.path.resolve():
        return
    settings = [ConfigFile(str(folder.newest_config()), folder.newest_config(), {})]
    has_checkpoint = bool(folder.checkpoints_newest_first())
    command = resume_command("fit", settings, folder, "last" if has_checkpoint else "auto")
    remedy = "resume it" if has_checkpoint else "it has no checkpoint: start it again"
    raise UserError(f"{folder.path} holds a run already; {remedy} with '{command}', or choose another --run.name")


def _run_of(start: StartPoint) -> Path | None:
    """Return the path of the run whose checkpoint is started from."""
    own = _owner(start.checkpoint) if start.checkpoint else None
    return own.path.resolve() if own else None


class FinishedError(Exception):
    """A requeued run is finished already."""


def _check_not_done(start: StartPoint, rollout_steps: int | None, ckpt_path: str | None) -> None:
    """Check that something is left to train or to write; ``--ckpt_path auto`` raises ``FinishedError`` otherwise."""
    done = start.resumed_from
    if done is None:
        return
    is_own = _run_of(start) in (None, start.folder.path.resolve())
    finished = is_own and start.folder.is_finished and start.folder.read_results().get("rollout_step") == done
    remedy = f"model.rollout_steps is {rollout_steps}; raise it to go on"
    if rollout_steps is None:
        rollout_steps, remedy = done + (not finished), "these were all; give a new run more data.epochs"
    if ckpt_path == "auto" and finished:
        _check_not_finished(start.folder, done, rollout_steps)
    if done > rollout_steps or (done == rollout_steps and finished):
        raise UserError(f"nothing is left to do: the checkpoint holds {done} rollout steps and {remedy}")


def _check_not_finished(folder: RunFolder, done: int, rollout_steps: int) -> None:
    if done >= rollout_steps:
        raise FinishedError(f"{folder.path} is finished at rollout step {done}")
    if stops_of_guard(folder)[-1:] == [done]:
        raise FinishedError(
            f"{folder.path} is finished at rollout step {done}, where its guard stopped it; --ckpt_path last goes on"
        )


def resume_command(
    verb: str, settings: Sequence[ConfigFile | Option], folder: RunFolder, ckpt_path: str = "last"
) -> str:
    """Return the command that continues a run."""
    words = [verb]
    for setting in settings:
        if setting.name not in ("--run.root", "--run.name", "--ckpt_path"):
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
