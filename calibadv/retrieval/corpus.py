"""Reading corpora in the field's formats."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from calibadv.jsonl import read_jsonl
from calibadv.types import Document


def read_corpus(path: str | Path) -> list[Document]:
    r"""Read a corpus: one document per line, in one of two formats.

    ``{"id", "contents": "\"Title\"\ntext"}`` (Search-R1, FlashRAG) or ``{"id", "title", "text"}``; ids may be strings
    or integers.

    Args:
        path: JSON-lines file, plain or gzip; or ``embedded``, the passages of the embedded world.

    Returns:
        The documents, in the order of the file.

    Raises:
        ValueError: the file is missing or empty, a line is not such an object, or an id occurs twice.
    """
    if str(path) == "embedded":
        from calibadv.world import embedded_world

        return list(embedded_world().documents)
    documents: list[Document] = []
    first_lines: dict[str, int] = {}
    with closing(read_jsonl(path, "corpus")) as lines:
        for number, record in lines:
            document = _parse_document(record, f"{path}:{number}")
            first = first_lines.setdefault(document.id, number)
            if first != number:
                raise ValueError(f"{path}:{number} repeats the id '{document.id}' of line {first}; ids must be unique")
            documents.append(document)
    if not documents:
        raise ValueError(f"corpus '{path}' is empty; it must hold at least one document")
    return documents


def _parse_document(record: dict[str, Any], place: str) -> Document:
    row_id = record.get("id")
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise ValueError(f"{place} has the id {row_id!r}; it must be a string or an integer")
    if "title" in record and "text" in record:
        title, text = _string(record, "title", place), _string(record, "text", place)
    elif "contents" in record:
        title, text = _split_contents(_string(record, "contents", place))
    else:
        keys = ", ".join(record)
        raise ValueError(f"{place} has only the keys {keys}; a document needs 'contents', or 'title' and 'text'")
    return Document(id=str(row_id), title=title, text=text)


def _string(record: dict[str, Any], key: str, place: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{place} has {value!r:.60} as '{key}'; it must be a string")
    return value


def _split_contents(contents: str) -> tuple[str, str]:
    title, newline, text = contents.partition("\n")
    if not newline:
        return "", contents
    quoted = len(title) >= 2 and title[0] == title[-1] == '"'
    # One pair of quotes belongs to the format; further ones belong to the title.
    return (title[1:-1] if quoted else title), text
