"""Errors for users end in one line on the standard error stream, those of developers in a traceback."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from calibadv.errors import ServiceError, UserError


def message_for_users(error: BaseException) -> str | None:
    """Find the message that is meant for the user.

    jsonargparse wraps what a constructor raises where the value might be of several types, such as ``Lora | None``.

    Args:
        error: as caught.

    Returns:
        The message of the error, or of the first of its causes that is meant for users; None if none of them is.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError | ServiceError):
        cause = cause.__cause__
    return None if cause is None else str(cause)


def report(message: str) -> None:
    """Print an error on the standard error stream, in one line.

    Args:
        message: what is wrong, the limit and the remedy.
    """
    line = Text.assemble(("calibadv: error: ", "bold red"), " ".join(message.split()))
    Console(stderr=True, soft_wrap=True).print(line, highlight=False)
