"""Integrity of the files of a folder: names, sizes and digests.

Comparing digests reads every byte, which takes minutes for 60 GB. So ``verified.json`` records size, inode and
modification time of every file at the last comparison; a file for which they are unchanged is not read again. If the
folder is not writable, the record is kept in the user's cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, suppress
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

from rich.console import Console
from rich.filesize import decimal

from calibadv.errors import UserError, one_line
from calibadv.io.files import write_atomically
from calibadv.io.progress_bar import progress_bar
from calibadv.retrieval._metadata import read_metadata

_VERIFIED = "verified.json"
_BLOCK = 1 << 22
# From this many bytes on, reading takes more than about two seconds.
_LARGE_BYTES = 200_000_000

FileStats = dict[str, list[int]]
"""Size, inode and modification time of each file, by its name."""


def cache_folder() -> Path:
    """Return the folder for files that can be made again."""
    return Path(os.environ.get("CALIBADV_CACHE") or Path.home() / ".cache" / "calibadv")


def check_names(path: Path, files: Collection[str], names: Collection[str], remedy: str) -> None:
    """Refuse metadata whose list of files lacks a required name."""
    for name in names:
        if name not in files:
            raise UserError(f"'{path}' is damaged (its files lack {name}); {remedy}")


def check_sizes(folder: Path, sizes: Mapping[str, int], remedy: str) -> None:
    """Refuse a folder in which a file is missing or does not have its recorded size."""
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"'{path}' is missing; it must have {size} bytes: {remedy}")
        found = path.stat().st_size
        if found != size:
            raise UserError(f"'{path}' has {found} bytes; it must have {size}: {remedy}")


def compute_digests(folder: Path, names: Collection[str]) -> tuple[dict[str, str], FileStats]:
    """Return the digests of files that were just written, and their stats for ``record_verified``."""
    stats = _file_stats(folder, names)
    with _reading("Computing digests", stats, names) as advance:
        return {name: _digest(folder / name, advance) for name in names}, stats


def check_digests(manifest: Path, digests: Mapping[str, str], remedy: str) -> None:
    """Compare the files beside a manifest that were copied or changed since the last comparison."""
    folder = manifest.parent
    stats = _file_stats(folder, digests)
    verified = [_load_verified(path, manifest) for path in _verified_paths(folder)]
    changed = {
        name: digest for name, digest in digests.items() if stats[name] not in [each.get(name) for each in verified]
    }
    if changed:
        _print_notice(
            f"reading {decimal(_total_bytes(stats, changed))} of '{folder}' once, to verify files that were copied or "
            "changed since they were last verified"
        )
        _compare(folder, changed, stats, remedy)
        record_verified(manifest, stats)


def verify_digests(manifest: Path, digests: Mapping[str, str], remedy: str) -> None:
    """Compare all files beside a manifest, also those that were compared before."""
    folder = manifest.parent
    for path in _verified_paths(folder):  # so that a folder found damaged now is not opened later
        with suppress(OSError):
            path.unlink(missing_ok=True)
    stats = _file_stats(folder, digests)
    _compare(folder, digests, stats, remedy)
    record_verified(manifest, stats)


def record_verified(manifest: Path, stats: FileStats) -> None:
    """Record that the files beside a manifest matched their digests when they had these stats."""
    content = json.dumps({"record": _digest(manifest), "stamps": stats}, indent=1) + "\n"
    paths = _verified_paths(manifest.parent)
    for path in paths:
        # A unique name, since other processes may write the same file at this moment.
        partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
        with suppress(OSError):
            write_atomically(path, content, partial)
            return
    _print_notice(
        f"'{paths[-1]}' cannot be written, and so the files of '{manifest.parent}' will be read again at the next "
        "start; set CALIBADV_CACHE to a folder that can be written to"
    )


def _compare(folder: Path, digests: Mapping[str, str], stats: FileStats, remedy: str) -> None:
    with _reading("Comparing digests", stats, digests) as advance:
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


def _reading(
    description: str, stats: FileStats, names: Collection[str]
) -> AbstractContextManager[Callable[[int], None]]:
    size = _total_bytes(stats, names)
    return progress_bar(description, size, hidden=size < _LARGE_BYTES)


def _total_bytes(stats: FileStats, names: Collection[str]) -> int:
    return sum(stats[name][0] for name in names)


def _digest(path: Path, advance: Callable[[int], None] = lambda read: None) -> str:
    state = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
            advance(len(block))
    return state.hexdigest()


def _file_stats(folder: Path, names: Collection[str]) -> FileStats:
    stats = {name: (folder / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_ino, stat.st_mtime_ns] for name, stat in stats.items()}


def _verified_paths(folder: Path) -> list[Path]:
    """Paths of the record for a folder: in the folder, and in the cache where the folder is not writable."""
    name = blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
    with suppress(RuntimeError):  # there is no home
        return [folder / _VERIFIED, cache_folder() / "verified" / f"{name}.json"]
    return [folder / _VERIFIED]


def _load_verified(path: Path, manifest: Path) -> FileStats:
    try:
        content = read_metadata(path, {"record": str, "stamps": dict}, "")
    except UserError:  # missing or damaged: reading the files again costs only time
        return {}
    stats: FileStats = content["stamps"]
    return stats if content["record"] == _digest(manifest) else {}


def _print_notice(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, markup=False)
