"""Errors at the command line: one line on standard error for those that a user can mend, a traceback for others."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.text import Text

from calibadv.errors import ServiceError, UserError, is_out_of_memory

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write, where the system does not name the file."""
_REMEDIES = {
    **dict.fromkeys(WRITE_ERRORS, "free space on the disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable, or choose another folder"),
    errno.ENOENT: "was it removed or renamed meanwhile?",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
_OF_THE_NETWORK = (ConnectionError, TimeoutError, socket.gaierror, socket.herror)


def user_message(error: BaseException) -> str | None:
    """Return the message for the user, or None for an error of the code.

    jsonargparse wraps what a constructor raises if the value might be of several types, such as ``Lora | None``.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError | ServiceError):
        cause = cause.__cause__
    return _system_message(error) if cause is None else str(cause)


def _system_message(error: BaseException) -> str | None:
    """Return the message for a failure of the system: files, memory, or the depth of the stack."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _OF_THE_NETWORK):
        where = f"'{os.fsdecode(error.filename)}': " if error.filename else "a file cannot be written or read: "
        remedy = _REMEDIES.get(error.errno, "check the disk, or choose another folder")
        return f"{where}{error.strerror}; {remedy}"
    if is_out_of_memory(error):
        return (
            f"there is not enough memory ({' '.join(str(error).split())[:200] or 'MemoryError'}); lower "
            "model.micro_batch_tokens (update) or model.engine.batch_size (sampling), set "
            "model.gradient_checkpointing, or train adapters (model.lora); 'calibadv plan' estimates what is needed"
        )
    if isinstance(error, RecursionError):
        return "something is nested too deeply to be read; check the JSON or YAML that was given"
    return None


def run_reporting(command: Callable[[], int]) -> int:
    """Run a command and return its exit status: 2 after an error that is reported in one line, 130 after Ctrl-C."""
    try:
        return command()
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print_error(message, getattr(error, "__notes__", ()))
        return 2
    except KeyboardInterrupt:
        print_error("stopped at once; what was written before is kept")
        return 130


def print_error(message: str, notes: Iterable[str] = ()) -> None:
    """Print an error in one line on standard error, and its notes below."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("calibadv: error: ", "bold red"), " ".join(message.split())))
    for note in notes:
        console.print(note, markup=False)
