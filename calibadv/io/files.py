"""Writing files whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What systems say that cannot open a folder, or cannot be told to write something to disk now.
_UNABLE = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}


def remove(path: Path) -> None:
    """Remove a file, or the folder that a sharded checkpoint is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_atomically(path: Path, text: str, partial: Path | None = None) -> None:
    """Write a text file whole or not at all, also where the power fails."""
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


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as ``numpy.save`` does, whole or not at all.

    numpy hands a file to C, and does not notice where the last bytes find no space.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data.cast("B"))
        replace_durably(partial, path)
    finally:
        partial.unlink(missing_ok=True)
