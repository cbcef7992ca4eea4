"""Stopping a function before each of its operations on files, as a kill would."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


class Killed(BaseException):
    """Passes by every handler of errors."""


@dataclass
class _Trigger:
    root: str = ""
    left: int = 0


_TRIGGER = _Trigger()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _TRIGGER.left or event not in _EVENTS:
        return
    # Python removes the content of a folder by names that are relative to it.
    if str(arguments[0]).startswith(_TRIGGER.root) or (event in ("os.remove", "os.rmdir") and arguments[-1] != -1):
        _TRIGGER.left -= 1
        if not _TRIGGER.left:
            raise Killed


sys.addaudithook(_hook)  # stays for good, and does nothing unless it is armed


def kill_points(folder: Path, function: Callable[[Path], object], every: int = 1) -> Iterator[Path]:
    """Call a function again and again, killed before its first operation on files, its second, and so on.

    Args:
        folder: where to make the folders for it.
        function: writes to the folder that it is given.
        every: leave out all moments but every so manieth.

    Yields:
        The folder, as the kill left it. It ends with the call that is not killed.
    """
    for moment in count(1, every):
        out = folder / f"killed-{moment}"
        _TRIGGER.root, _TRIGGER.left = str(out), moment
        try:
            function(out)
        except Killed:
            yield out
        else:
            return
        finally:
            _TRIGGER.left = 0


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder.

    Args:
        folder: the folder.

    Returns:
        Contents by relative path.
    """
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def index_files(folder: Path) -> dict[str, bytes]:
    """The files of an index, without the record of their inodes and times."""
    return {name: content for name, content in tree(folder).items() if name != "verified.json"}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Make every write beyond a file size fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
