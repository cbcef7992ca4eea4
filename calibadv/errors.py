"""Errors whose message is for the user: the command line prints it in one line, and no traceback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from calibadv.types import ScoredDocument

# Characters of another error's message, and of a value, in a message.
_LONGEST, _SHOWN = 300, 80
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


class UserError(ValueError):
    """A mistake in what the user gave; the message names the value, the limit and the remedy."""


class ServiceError(RuntimeError):
    """A service that the run depends on does not answer, or not as it should."""


class ToolError(ServiceError):
    """A call of a tool that failed. The rollout that made it ends as ``search_failed`` and is not trained on."""


class RetrievalError(ToolError):
    """A search that failed."""


class OutageError(RetrievalError):
    """The service behind a retriever is away, and may come back: a run in training waits for it.

    Args:
        message: what does not answer, and the remedy.
        patience: the seconds that the caller may wait and ask again; 0 for not at all.
    """

    def __init__(self, message: str, patience: float = 0.0) -> None:
        super().__init__(message)
        self.patience = patience


class PartialRetrievalError(RetrievalError):
    """Some queries of a search failed; what the others found is kept.

    Args:
        results: one entry per query: its documents, or why it failed.
    """

    def __init__(self, results: Sequence[list[ScoredDocument] | RetrievalError]) -> None:
        errors = [result for result in results if isinstance(result, RetrievalError)]
        reason = f"{errors[0]} " if errors else ""
        super().__init__(f"{reason}({len(errors)} of {len(results)} searches failed)")
        self.results = results


class StopRequestedError(Exception):
    """A signal asked the run to stop while it waited for something: the rollout step in progress is given up."""


class RollbackError(RuntimeError):
    """The run is to go on from an earlier checkpoint; ``calibadv fit`` does so by itself."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"CollapseGuard went back to a healthy checkpoint; to go on: --ckpt_path {checkpoint}")
        self.checkpoint = checkpoint


@contextmanager
def naming_part(
    call: str, advice: str, passing: tuple[type[Exception], ...] = (UserError, ServiceError, StopRequestedError)
) -> Iterator[None]:
    """Report an error of a part, a user's perhaps, as a UserError that names the call that raised it.

    Errors that are for the user already, and those of memory, whose message has its own advice, pass as they are.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{call} raised {type(error).__name__} ({one_line(error)}){advice}") from error


def one_line(error: BaseException) -> str:
    """Return the message of an error, in one line."""
    reason = error.strerror if isinstance(error, OSError) else None
    return " ".join(str(reason or error).split())[:_LONGEST] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an error says that there is not enough memory, of the machine or of an accelerator."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def is_number(value: Any) -> bool:
    """Return True for a real number of Python or numpy, truth values included; a tensor is none."""
    return isinstance(value, (int, float, np.integer, np.floating, np.bool_))


def shown(value: Any) -> str:
    """Show what a part returned in a message."""
    text = str(value) if is_number(value) else f"{type(value).__name__} {value!r}"
    text = "None" if value is None else " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
