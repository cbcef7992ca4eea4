"""Atomic and durable writing of files."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibadv.errors import UserError

# Errors of systems that cannot open a folder or do not support fsync.
_UNABLE = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, such as a sharded checkpoint."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_atomically(path: Path, text: str, partial: Path | None = None) -> None:
    """Write a text file whole or not at all, even if the power fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial or path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        replace_durably(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_durably(partial: Path, path: Path) -> None:
    """Rename a file or folder to its final path, after its content has reached the disk.

    Without this, the name may reach the disk before the content, and a power failure would leave an incomplete file.
    """
    for written in (*partial.rglob("*"), partial):
        if not written.is_symlink():
            _sync(written)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, if the system supports it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise


def create_durably(path: Path, text: str) -> None:
    """Write a text file that must not exist yet; nothing remains of it if that fails."""
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            _sync(path)
            _sync(path.parent)
        except OSError:
            path.unlink()
            raise


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as ``numpy.save`` does, whole or not at all.

    ``numpy.save`` does not notice if the disk has no room for the last bytes.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data.cast("B"))
        replace_durably(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_empty(out: Path) -> None:
    """Refuse a folder to write that holds something."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out '{out}' exists and is not an empty folder; name another folder, or remove it")
