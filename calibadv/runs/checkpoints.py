"""Checkpoint files: writing, digests, and checks for damage."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from hashlib import blake2b, file_digest
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from typing_extensions import override

from calibadv.distributed import ProcessGroup
from calibadv.io.files import write_atomically
from calibadv.io.progress_bar import progress_bar
from calibadv.runs.folder import step_of

_META = "meta.pt"  # what Lightning writes of a sharded checkpoint beside the shards
_DIGESTS = "digests.json"
# Keys of a checkpoint and their types; those of a sharded one are without weights and optimizer, which the shards hold.
_Kinds = Mapping[str, type | UnionType]
_KINDS: _Kinds = {
    "pytorch-lightning_version": str,
    "rollout_step": int,
    "validated_step": int,
    "seed": int,
    "protocol": dict,
    "callbacks": dict,
    "loops": dict,
}
_TENSOR_KINDS: _Kinds = {"state_dict": dict, "optimizer_states": list}
# Keys in the states of callbacks and of Lightning's loops.
_RESULTS_KINDS: _Kinds = {"validations": list, "statuses": dict, "wall_seconds": int | float}
_GUARD_KINDS: _Kinds = {"watch": dict, "events": list}
_LOOP_KINDS: _Kinds = {"epoch_loop.batch_progress": dict, "epoch_progress": dict}
_VERSION = re.compile(r"\d+\.\d+")
_BLOCK = 1 << 24
_LARGE = 2_000_000_000  # bytes, which take some seconds
_NOT_READABLE = (RuntimeError, OSError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError)


class CheckpointFile(TorchCheckpointIO):
    """Writes a checkpoint straight to its file; Lightning's own makes copies in memory and in the temporary folder.

    The other processes wait for the one that writes, so an error is kept until all can raise it.
    """

    def __init__(self) -> None:
        self.failure: str | None = None  # reason why the last checkpoint could not be written

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.failure = None
        try:
            Path(path).parent.mkdir(exist_ok=True)
            with Path(path).open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            self.failure = _system_reason(error)


def _system_reason(error: BaseException) -> str:
    """Return the message of the system, which torch wraps into an error of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return str((cause and cause.strerror) or error)


def write_digests(folder: Path, processes: ProcessGroup) -> None:
    """Write the digests of a sharded checkpoint's files; each process computes those of its own files."""
    own = [file for file in sorted(folder.iterdir()) if _shard_owner(file) == processes.rank]
    found = processes.gather({file.name: _digest(file) for file in own})
    if processes.rank == 0:
        write_atomically(folder / _DIGESTS, json.dumps({k: v for part in found for k, v in part.items()}, indent=2))


def _shard_owner(file: Path) -> int:
    """Return the rank that has written a file: 1 for ``__1_0.distcp``, 0 for files of other names."""
    rank = file.name.removeprefix("__").partition("_")[0]
    return int(rank) if file.suffix == ".distcp" and rank.isdecimal() else 0


def damage(checkpoint: Path) -> str | None:
    """Read all of a checkpoint, and return the first fault found, or None.

    The records of a checkpoint file carry their checksums (CRC-32), since it is a zip file; the files of a sharded one
    have digests beside them, unless an earlier version has written them.
    """
    changed = _changed_shard(checkpoint) if checkpoint.is_dir() else _changed_record(checkpoint)
    if changed is not None:
        return changed
    try:
        content = read_content(checkpoint)
    except _NOT_READABLE as error:
        return f"it does not load: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return _wrong_content(content, checkpoint)


def read_content(checkpoint: Path) -> Any:
    """Load a checkpoint; its tensors are memory-mapped, and left out of a sharded one."""
    file = checkpoint / _META if checkpoint.is_dir() else checkpoint
    return torch.load(file, weights_only=True, mmap=True, map_location="cpu")


def _changed_record(file: Path) -> str | None:
    name, size = "", file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive, _progress(size) as advance:
            for name in archive.namelist():
                with archive.open(name) as record:  # compares the checksum at its end
                    while block := record.read(_BLOCK):
                        advance(len(block))
    # zipfile raises errors of many kinds on changed bytes, such as an unknown compression or a missing password.
    except Exception as error:
        return f"bytes of its record {name} have changed" if name else f"it is no whole file: {error}"
    return None


def _changed_shard(folder: Path) -> str | None:
    if not (folder / _META).is_file():
        return f"it has no {_META}"
    try:
        recorded: Any = json.loads((folder / _DIGESTS).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        return f"its {_DIGESTS} is damaged ({error})"
    if not isinstance(recorded, dict):
        return f"its {_DIGESTS} is damaged (it holds no file names)"
    missing = next((name for name in recorded if not (folder / name).is_file()), None)
    if missing is not None:
        return f"its file {missing} is missing"
    sizes = {name: (folder / name).stat().st_size for name in recorded}
    with _progress(sum(sizes.values())) as advance:
        for name, digest in recorded.items():
            if _digest(folder / name) != digest:
                return f"its file {name} is damaged"
            advance(sizes[name])
    return None


def _progress(size: int) -> AbstractContextManager[Callable[[int], None]]:
    return progress_bar("Checking the checkpoint", size, hidden=size < _LARGE)


def _wrong_kind(content: Any, kinds: _Kinds) -> str | None:
    if not isinstance(content, Mapping):
        return f"it holds {type(content).__name__}, and not the parts of a checkpoint"
    for key, kind in kinds.items():
        if key not in content:
            return f"it has no '{key}'"
        if not isinstance(content[key], kind) or isinstance(content[key], bool):
            return f"it has {content[key]!r:.40} as '{key}'"
    return None


def _wrong_content(content: Any, checkpoint: Path) -> str | None:
    wrong = _wrong_kind(content, _KINDS if checkpoint.is_dir() else {**_KINDS, **_TENSOR_KINDS})
    if wrong:
        return wrong
    problems = chain(_wrong_values(content, step_of(checkpoint)), _wrong_states(content), _not_finite(content))
    return next(problems, None)


def _wrong_values(content: dict[str, Any], named_step: int) -> Iterator[str]:
    step, version = content["rollout_step"], content["pytorch-lightning_version"]
    if step < 0:
        yield f"it has {step} as 'rollout_step'"
    if named_step not in (-1, step):
        yield f"it holds rollout step {step}, which its name contradicts"
    if not _VERSION.match(version):
        yield f"it has {version!r:.40} as 'pytorch-lightning_version'"
    if "skipped_in_a_row" in content and (wrong := _wrong_kind(content, {"skipped_in_a_row": int})):
        yield wrong


def _wrong_states(content: dict[str, Any]) -> Iterator[str]:
    """Find what callbacks and Lightning's loops could not go on from."""
    callbacks, loops = content["callbacks"], content["loops"]
    if wrong := _wrong_kind(loops, {"fit_loop": dict}):
        yield wrong
        return
    for part, key, kinds in (
        (callbacks, "Results", _RESULTS_KINDS),
        (callbacks, "CollapseGuard", _GUARD_KINDS),
        (loops, "fit_loop", _LOOP_KINDS),
    ):
        if key in part and (wrong := _wrong_kind(part[key], kinds)):
            yield f"in '{key}', {wrong}"
            return
    results = callbacks.get("Results", {})
    yield from filter(
        None,
        (
            _wrong_kind(loops["fit_loop"]["epoch_loop.batch_progress"], {"total": dict, "current": dict}),
            *map(_wrong_row, results.get("validations", ())),
            _wrong_kind(results.get("statuses", {}), dict.fromkeys(results.get("statuses", ()), int)),
        ),
    )


def _not_finite(content: dict[str, Any]) -> Iterator[str]:
    for name, tensor in content.get("state_dict", {}).items():
        if not _is_finite(tensor):
            yield f"its weight {name} is not finite"
    for optimizer in content.get("optimizer_states", ()):
        for number, state in optimizer.get("state", {}).items():
            for name, value in state.items():
                if isinstance(value, Tensor) and not _is_finite(value):
                    yield f"the state of its optimizer ('{name}' of parameter {number}) is not finite"


def _wrong_row(row: Any) -> str | None:
    return (wrong := _wrong_kind(row, {"step": int})) and f"in a validation, {wrong}"


def _is_finite(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and (not tensor.is_floating_point() or bool(tensor.isfinite().all()))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()
