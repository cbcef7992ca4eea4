"""Reading of JSON lines, plain or gzip."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import open as open_with_progress

from calibadv.errors import UserError

# From this size on, reading takes longer than about two seconds, so a progress bar is shown.
_LARGE_FILE = 200_000_000
_GZIP_MAGIC = b"\x1f\x8b"


class UnreadableError(UserError):
    """A file that the system cannot read; nothing is known of its content."""


def read_jsonl(path: str | Path, what: str, after: int = 0) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Read one JSON object per line, UTF-8, plain or gzip (detected by content, not by name).

    Blank lines are skipped. Large files show a progress bar on standard error. The file is open until the last line is
    read: a caller that may stop earlier uses ``contextlib.closing``.
    """
    path = Path(path)
    number = 0
    try:
        if not path.is_file():
            reason = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"{what} '{path}' {reason}; give a JSON-lines file, plain or gzip")
        with _open_bytes(path, what) as lines:
            for number, line in enumerate(lines, 1):
                if number > after and not line.isspace():
                    yield number, _parse_object(line, f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{what} '{path}' is a damaged gzip file after line {number}; copy it again") from error
    except OSError as error:
        raise unreadable(what, path, error) from error


def unreadable(what: str, path: Path, error: OSError) -> UnreadableError:
    """Return the error for a file that the system cannot read."""
    reason = error.strerror or error
    return UnreadableError(
        f"{what} '{path}' cannot be read ({reason}); check its permissions and disk, or copy it again"
    )


@contextmanager
def _open_bytes(path: Path, what: str) -> Iterator[Iterable[bytes]]:
    small = path.stat().st_size < _LARGE_FILE
    console = Console(stderr=True)
    progress = open_with_progress(
        path, "rb", buffering=0, description=f"Reading the {what}", console=console, transient=True, disable=small
    )
    # rich counts every call that reads; in blocks of a megabyte that costs nothing.
    with progress as raw, io.BufferedReader(cast("io.RawIOBase", raw), 1 << 20) as buffered:
        if buffered.peek(2)[:2] == _GZIP_MAGIC:
            with gzip.open(buffered) as unpacked:
                yield unpacked
        else:
            yield buffered


def _parse_object(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not a JSON object ({error}); write one object per line, in UTF-8") from error
    if not isinstance(value, dict):
        raise UserError(f"{place} is not a JSON object but {type(value).__name__}; write one object per line")
    return value
