"""Reading of documents from JSON-lines files in common formats."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from calibadv.errors import UserError
from calibadv.io.jsonl import read_jsonl
from calibadv.types import Document


def read_documents(path: str | Path, after: int = 0) -> Generator[tuple[int, Document], None, None]:
    r"""Read one document per line, with its line number, in one of two formats.

    ``{"id", "contents": "\"Title\"\ntext"}`` (Search-R1, FlashRAG) or ``{"id", "title", "text"}``; ids may be strings
    or integers.
    """
    with closing(read_jsonl(path, "corpus", after)) as lines:
        for number, record in lines:
            yield number, parse_document(record, f"{path}:{number}")


def parse_document(record: dict[str, Any], location: str) -> Document:
    """Parse one object of a corpus file; ``location`` is its name in messages."""
    row_id = record.get("id")
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise UserError(f"{location} has the id {row_id!r}; it must be a string or an integer")
    if "title" in record and "text" in record:
        title, text = _string(record, "title", location), _string(record, "text", location)
    elif "contents" in record:
        title, text = _split_contents(_string(record, "contents", location))
    else:
        keys = ", ".join(record)
        raise UserError(f"{location} has only the keys {keys}; a document needs 'contents', or 'title' and 'text'")
    document = Document(id=str(row_id), title=title, text=text)
    try:
        f"{document.id}{title}{text}".encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{location} has {half!a}, half of a surrogate pair; no text may hold it: remove it") from error
    return document


def _string(record: dict[str, Any], key: str, location: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f"{location} has {value!r:.60} as '{key}'; it must be a string")
    return value


def _split_contents(contents: str) -> tuple[str, str]:
    title, newline, text = contents.partition("\n")
    if not newline:
        return "", contents
    quoted = len(title) >= 2 and title[0] == title[-1] == '"'
    # One pair of quotes belongs to the format; further ones belong to the title.
    return (title[1:-1] if quoted else title), text
