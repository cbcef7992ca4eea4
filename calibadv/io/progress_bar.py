"""Progress bars on standard error, shown on terminals only and cleared when done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

_T = TypeVar("_T")


@contextmanager
def progress_bar(description: str, total: int, hidden: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar, and return a function that advances it."""
    console = Console(stderr=True)
    hidden = hidden or not console.is_terminal  # elsewhere it would leave an empty line
    with Progress(console=console, transient=True, disable=hidden) as progress:
        yield partial(progress.advance, progress.add_task(description, total=total))


def tracked(items: Iterable[_T], description: str, total: int) -> Iterator[_T]:
    """Iterate over items under a progress bar."""
    with progress_bar(description, total, hidden=False) as advance:
        for item in items:
            yield item
            advance(1)


def blocks(items: Sequence[_T], size: int, description: str, hidden: bool) -> Iterator[Sequence[_T]]:
    """Iterate over slices under a progress bar. Slices of a corpus on disk are read in its order."""
    with progress_bar(description, len(items), hidden) as advance:
        for start in range(0, len(items), size):
            block = items[start : start + size]
            yield block
            advance(len(block))
