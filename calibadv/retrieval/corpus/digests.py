"""Whether the files of a folder still hold what was written into them: their digests, and when these are compared.

Comparing reads every byte, which takes minutes for 60 GB. So ``verified.json`` keeps size, inode and time of
modification of every file as they were when it was last compared; a file of which they are still the same is not read
again. Where the folder cannot be written to, that record lies in the user's cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

from rich.console import Console
from rich.filesize import decimal

from calibadv.errors import UserError, one_line
from calibadv.io.files import write_atomically
from calibadv.io.progress_bar import progress_bar
from calibadv.retrieval._metadata import read_record

VERIFIED = "verified.json"
_BLOCK = 1 << 22
# From this many bytes on, reading takes longer than about two seconds.
_LARGE_BYTES = 200_000_000

Stamps = dict[str, list[int]]
"""Size, inode and time of modification of each file, by its name."""


def cache_folder() -> Path:
    """Where files are kept that can be made again."""
    return Path(os.environ.get("CALIBADV_CACHE") or Path.home() / ".cache" / "calibadv")


def seal(folder: Path, names: Collection[str]) -> tuple[dict[str, str], Stamps]:
    """Read the files of a folder that has just been written."""
    stamps = _stamps(folder, names)
    size = sum(stamps[name][0] for name in names)
    with progress_bar("Computing digests", size, hidden=size < _LARGE_BYTES) as advance:
        return {name: _digest(folder / name, advance) for name in names}, stamps


def remember(record: Path, stamps: Stamps) -> None:
    """Keep it that the files of a folder were as their digests say, so that they are not read again."""
    content = {"record": _digest(record), "stamps": stamps}
    memories = _memories(record.parent)
    for path in memories:
        # Others may write the same at this moment.
        partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
        with suppress(OSError):
            write_atomically(path, json.dumps(content, indent=1) + "\n", partial)
            return
    _say(
        f"'{memories[-1]}' cannot be written, and so the files of '{record.parent}' will be read again at the next "
        "start; set CALIBADV_CACHE to a folder that can be written to"
    )


def check_digests(record: Path, digests: Mapping[str, str], remedy: str) -> None:
    """Compare the files of a folder that were copied or changed since they were last compared."""
    folder = record.parent
    stamps = _stamps(folder, digests)
    known = [_remembered(path, record) for path in _memories(folder)]
    changed = [name for name in digests if stamps[name] not in [each.get(name) for each in known]]
    if changed:
        size = sum(stamps[name][0] for name in changed)
        _say(
            f"reading {decimal(size)} of '{folder}' once, to see whether the files are whole, which were copied or "
            "changed since that was last done"
        )
        _compare(folder, {name: digests[name] for name in changed}, size, remedy)
        remember(record, stamps)


def verify_digests(record: Path, digests: Mapping[str, str], remedy: str) -> None:
    """Compare all files of a folder, whatever was compared before."""
    folder = record.parent
    for path in _memories(folder):  # what is found damaged now is not opened later
        with suppress(OSError):
            path.unlink(missing_ok=True)
    stamps = _stamps(folder, digests)
    _compare(folder, digests, sum(stamps[name][0] for name in digests), remedy)
    remember(record, stamps)


def _compare(folder: Path, digests: Mapping[str, str], size: int, remedy: str) -> None:
    with progress_bar("Comparing digests", size, hidden=size < _LARGE_BYTES) as advance:
        for name, digest in digests.items():
            path = folder / name
            try:
                found = _digest(path, advance)
            except OSError as error:
                raise UserError(f"'{path}' cannot be read ({one_line(error)}); {remedy}") from error
            if found != digest:
                raise UserError(
                    f"'{path}' is damaged (its digest is {found}, and that of what was written {digest}); {remedy}"
                )


def _digest(path: Path, advance: Callable[[int], None] = lambda read: None) -> str:
    state = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
            advance(len(block))
    return state.hexdigest()


def _stamps(folder: Path, names: Collection[str]) -> Stamps:
    statuses = {name: (folder / name).stat() for name in names}
    return {name: [status.st_size, status.st_ino, status.st_mtime_ns] for name, status in statuses.items()}


def _memories(folder: Path) -> list[Path]:
    """Where it is kept what was compared: in the folder, or else in the cache."""
    name = blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
    with suppress(RuntimeError):  # there is no home
        return [folder / VERIFIED, cache_folder() / "verified" / f"{name}.json"]
    return [folder / VERIFIED]


def _remembered(path: Path, record: Path) -> Stamps:
    try:
        content = read_record(path, {"record": str, "stamps": dict}, "")
    except UserError:  # there is none, or it is damaged: nothing is lost but time
        return {}
    stamps: Stamps = content["stamps"]
    return stamps if content["record"] == _digest(record) else {}


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, markup=False)
