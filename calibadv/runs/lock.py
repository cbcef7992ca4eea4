"""Lock of a run folder, so that one process at a time writes into it."""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from calibadv.errors import UserError
from calibadv.runs.folder import RunFolder

log = logging.getLogger(__name__)

_NAME = ".lock"


class RunLock:
    """Lock of the run folder of this process, held until the context ends or the process dies.

    The lock file is in the run folder, which is made for it. Child processes do not inherit the lock.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._descriptor = -1
        self._made: list[Path] = []

    def __enter__(self) -> RunLock:
        """Return the lock, which is not taken yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock, and remove folders that were made for it and are empty."""
        if self._path is None:
            return
        self._path.unlink(missing_ok=True)  # a process that has opened it meanwhile notices this and tries again
        self._close()
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self._path = None

    def take(self, folder: RunFolder) -> None:
        """Take the lock of a run folder, unless this process holds it already."""
        path = folder.path / _NAME
        if self._path == path:
            return
        assert self._path is None, "a command writes into one run folder"
        self._made = [one for one in (folder.path, *folder.path.parents) if not one.exists()]
        folder.path.mkdir(parents=True, exist_ok=True)
        self._path = path
        while not self._lock(path):
            pass

    def _lock(self, path: Path) -> bool:
        """Lock the file. False if the process that held it has removed it meanwhile."""
        try:
            import fcntl
        except ImportError:  # Windows
            log.warning("this system has no file locks: make sure that no other process writes into %s", path.parent)
            return True
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.register_at_fork(after_in_child=self._close)  # a child that outlives this process would keep the lock
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return self._not_locked(path, error)
        if not path.exists() or os.fstat(self._descriptor).st_ino != path.stat().st_ino:
            self._close()
            return False
        with suppress(OSError):  # on a full disk the lock holds all the same
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
        return True

    def _not_locked(self, path: Path, error: OSError) -> bool:
        holder = os.read(self._descriptor, 200).decode(errors="replace") or "of unknown number"
        self._close()
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            self._path = None
            raise UserError(
                f"another process ({holder}) is writing into {path.parent}; wait for it or stop it, or choose "
                "another --run.name"
            ) from error
        log.warning(
            "%s cannot be locked (%s): make sure that no other process writes into it", path.parent, error.strerror
        )
        return True

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
