"""A folder of text files as a corpus: each file a document, long ones cut into passages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from calibadv.errors import UserError
from calibadv.types import Document

_SUFFIXES = (".txt", ".md")
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PassageSize:
    """Size of the passages that a long text is cut into."""

    words: int = 100
    overlap: int = 20  # words that a passage shares with the one before it

    def __post_init__(self) -> None:
        if self.words < 1 or not 0 <= self.overlap < self.words:
            raise UserError(
                f"passage_words is {self.words} and passage_overlap {self.overlap}; give at least one word, and an "
                "overlap from 0 to less than that"
            )


def text_files(folder: Path) -> list[Path]:
    """Return the text files in a folder and those below it, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())


def read_text_folder(folder: Path, size: PassageSize) -> list[Document]:
    """Read a folder of .txt and .md files.

    A document's title is the file's first Markdown heading, or else its name. Its id is its path below the folder, with
    the number of the passage where there are several.
    """
    paths = text_files(folder)
    if not paths:
        raise UserError(
            f"corpus '{folder}' is a folder without manifest.json, and so not an index, and holds no "
            f"{' or '.join(_SUFFIXES)} file; give another folder"
        )
    documents = [document for path in paths for document in _read_file(path, folder, size)]
    if not documents:
        raise UserError(f"corpus '{folder}' holds only empty text files; write a text into one")
    return documents


def _read_file(path: Path, folder: Path, size: PassageSize) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"corpus file '{path}' is not UTF-8 (byte {error.start}); save it in UTF-8") from error
    except OSError as error:
        raise UserError(f"corpus file '{path}' cannot be read ({error.strerror}); check its permissions") from error
    heading = _HEADING.search(text) if path.suffix.lower() == ".md" else None
    if heading:
        text = text[: heading.start()] + text[heading.end() :]
    title = heading[1] if heading else path.stem
    name = path.relative_to(folder).as_posix()
    passages = list(cut_passages(text, size))
    for number, passage in enumerate(passages, 1):
        yield Document(id=f"{name}#{number}" if len(passages) > 1 else name, title=title, text=passage)


def cut_passages(text: str, size: PassageSize) -> Iterator[str]:
    """Cut a text into passages that overlap, none for a text without words."""
    words = text.split()
    for start in range(0, max(len(words) - size.overlap, min(len(words), 1)), size.words - size.overlap):
        yield " ".join(words[start : start + size.words])
