"""Mistakes of users end in one line on the standard error stream, those of developers in a trace."""

from __future__ import annotations

import traceback
from pathlib import Path

from rich.console import Console
from rich.text import Text

import calibadv


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised on purpose by our own code, and so is a message for users.

    An error of a built-in function that our code calls, such as ``int``, has our frame innermost too; but there the
    line does not raise.

    Args:
        error: as caught.

    Returns:
        True if the innermost frame is a ``raise`` of this package.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not Path(frames[-1].filename).is_relative_to(Path(calibadv.__file__).parent):
        return False
    return (frames[-1].line or "").startswith("raise")


def message_for_users(error: BaseException) -> str | None:
    """What to tell the user of an error.

    jsonargparse wraps what a constructor raises where the value might be of several types, such as ``Lora | None``.

    Args:
        error: as caught.

    Returns:
        The message of the error, or of the first of its causes that is ours; None if none of them is.
    """
    cause: BaseException | None = error
    while cause is not None and not is_ours(cause):
        cause = cause.__cause__
    return None if cause is None else str(cause)


def report(message: str) -> None:
    """Print an error on the standard error stream, in one line.

    Args:
        message: what is wrong, the limit and the remedy.
    """
    line = Text.assemble(("calibadv: error: ", "bold red"), " ".join(message.split()))
    Console(stderr=True, soft_wrap=True).print(line, highlight=False)
