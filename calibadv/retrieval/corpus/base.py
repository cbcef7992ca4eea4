"""The documents that a retriever searches, with access by row, by id, and in order."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import overload

from typing_extensions import override

from calibadv.errors import UserError
from calibadv.types import Document

# Up to this size a file is read into memory, in about a second; larger files are converted once and memory-mapped.
IN_MEMORY_BYTES = 32_000_000


class Corpus(Sequence[Document]):
    """Documents with unique ids. A slice is a list; iteration keeps no document in memory.

    Made by ``open_corpus`` or ``Corpus.from_documents``.
    """

    @staticmethod
    def from_documents(documents: Iterable[Document]) -> Corpus:
        """Make a corpus in memory."""
        return MemoryCorpus(enumerate(documents, 1), "documents")

    @overload
    def __getitem__(self, row: int) -> Document: ...
    @overload
    def __getitem__(self, row: slice) -> list[Document]: ...
    def __getitem__(self, row: int | slice) -> Document | list[Document]:
        if isinstance(row, slice):
            return self._read(range(len(self))[row])
        wanted = range(len(self))[row]
        return self._read(range(wanted, wanted + 1))[0]

    @abstractmethod
    def _read(self, rows: range) -> list[Document]:
        """Return the documents of rows that exist."""

    @abstractmethod
    def row(self, doc_id: str) -> int:
        """Return the row of the document with an id; a UserError if no document has it."""

    @property
    @abstractmethod
    def checksum(self) -> str:
        """Checksum of all ids, titles and texts in order, whatever the file format: 32 hexadecimal digits."""


class MemoryCorpus(Corpus):
    """A corpus in memory, made of documents with their line numbers in the source."""

    def __init__(self, numbered: Iterable[tuple[int, Document]], name: str) -> None:
        self._documents: list[Document] = []
        self._rows: dict[str, int] = {}
        self._checksum = ""
        numbers: list[int] = []
        for number, document in numbered:
            first = self._rows.setdefault(document.id, len(numbers))
            if first != len(numbers):
                raise duplicate_id_error(f"{name}:{number}", document.id, numbers[first])
            self._documents.append(document)
            numbers.append(number)
        if not self._documents:
            raise empty_corpus_error(name)

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self._documents)

    @override
    def _read(self, rows: range) -> list[Document]:
        return [self._documents[row] for row in rows]

    @override
    def row(self, doc_id: str) -> int:
        if doc_id not in self._rows:
            raise unknown_id_error(doc_id, len(self))
        return self._rows[doc_id]

    @property
    @override
    def checksum(self) -> str:
        if not self._checksum:
            state = b""
            for document in self._documents:
                state = extend_checksum(state, document)
            self._checksum = state.hex()
        return self._checksum


def searchable_text(document: Document) -> str:
    """Return the text of a document for lexical search and reranking; an encoder has a form of its own."""
    return f"{document.title}\n{document.text}"


def extend_checksum(state: bytes, document: Document) -> bytes:
    """Return the checksum of the documents so far and one more."""
    # With the lengths of the first two texts, no other three texts give the same bytes.
    lengths = f"{len(document.id)} {len(document.title)} "
    return blake2b(state + f"{lengths}{document.id}{document.title}{document.text}".encode(), digest_size=16).digest()


def empty_corpus_error(name: str) -> UserError:
    """Return the error for a corpus without documents."""
    return UserError(f"corpus '{name}' is empty; it must hold at least one document")


def duplicate_id_error(location: str, doc_id: str, first: int) -> UserError:
    """Return the error for an id that occurs twice."""
    return UserError(f"{location} repeats the id '{doc_id}' of line {first}; ids must be unique")


def unknown_id_error(doc_id: str, documents: int) -> UserError:
    """Return the error for an id that no document has."""
    return UserError(f"none of the {documents} documents has the id '{doc_id}'; give an id of this corpus")
