"""How an error of another library is put into a message of ours."""

from __future__ import annotations

_LONGEST = 300


def one_line(error: BaseException) -> str:
    """What an error says, in one line.

    Args:
        error: as caught.

    Returns:
        The reason that the system gives, or else the message, at most 300 characters; the name of the class where
        there is neither.
    """
    reason = error.strerror if isinstance(error, OSError) else None
    return " ".join(str(reason or error).split())[:_LONGEST] or type(error).__name__
