"""The documents that a retriever searches: by row, by id, or one after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import overload

from calibadv.errors import UserError
from calibadv.retrieval.corpus_files import read_documents
from calibadv.types import Document

# Up to this size a file is read into memory, in about a second; larger ones are converted once and memory-mapped.
IN_MEMORY_BYTES = 32_000_000


class Corpus(Sequence[Document]):
    """Documents with unique ids. A slice is a list; iterating reads one after the other and keeps none.

    ``open_corpus`` and ``Corpus.from_documents`` make one.
    """

    @staticmethod
    def from_documents(documents: Iterable[Document]) -> Corpus:
        """Hold documents in memory.

        Args:
            documents: in the order of the rows.

        Returns:
            The corpus.

        Raises:
            UserError: there is no document, or an id occurs twice.
        """
        return _MemoryCorpus(enumerate(documents, 1), "documents")

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
        """Documents of rows that exist."""

    @abstractmethod
    def row(self, doc_id: str) -> int:
        """Find a document.

        Args:
            doc_id: its id.

        Returns:
            Its row.

        Raises:
            UserError: no document has this id.
        """

    @property
    @abstractmethod
    def checksum(self) -> str:
        """Of all ids, titles and texts in order, the same whatever file they came from: 32 hexadecimal digits."""


class _MemoryCorpus(Corpus):
    def __init__(self, numbered: Iterable[tuple[int, Document]], name: str) -> None:
        self._documents: list[Document] = []
        self._rows: dict[str, int] = {}
        self._checksum = ""
        numbers: list[int] = []
        for number, document in numbered:
            first = self._rows.setdefault(document.id, len(numbers))
            if first != len(numbers):
                raise repeated_id(f"{name}:{number}", document.id, numbers[first])
            self._documents.append(document)
            numbers.append(number)
        if not self._documents:
            raise empty_corpus(name)

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self._documents)

    def _read(self, rows: range) -> list[Document]:
        return [self._documents[row] for row in rows]

    def row(self, doc_id: str) -> int:
        if doc_id not in self._rows:
            raise unknown_id(doc_id, len(self))
        return self._rows[doc_id]

    @property
    def checksum(self) -> str:
        if not self._checksum:
            state = b""
            for document in self._documents:
                state = extend_checksum(state, document)
            self._checksum = state.hex()
        return self._checksum


def open_corpus(path: str | Path, in_memory_bytes: int = IN_MEMORY_BYTES) -> Corpus:
    """Open a corpus.

    A large file is converted once to memory-mapped Arrow files, in the folder that the environment variable
    CALIBADV_CACHE names, or else in ~/.cache/calibadv.

    Args:
        path: JSON-lines file, plain or gzip (``read_documents`` has the formats); a folder of ``calibadv index``; or
            ``embedded``, the passages of the embedded world.
        in_memory_bytes: files above this size are converted, others are held in memory.

    Returns:
        The documents, in the order of the file.

    Raises:
        UserError: the file is missing or empty, a line is not a document, an id occurs twice, or the folder is not a
            whole index.
    """
    if str(path) == "embedded":
        from calibadv.world import embedded_world

        return Corpus.from_documents(embedded_world().documents)
    path = Path(path)
    if path.is_dir():
        from calibadv.retrieval.manifest import open_index

        return open_index(path)[1]
    if path.is_file() and path.stat().st_size > in_memory_bytes:
        from calibadv.retrieval.corpus_cache import cached_corpus

        return cached_corpus(path)
    with closing(read_documents(path)) as numbered:
        return _MemoryCorpus(numbered, str(path))


def searched_text(document: Document) -> str:
    """What is searched of a document, but by an encoder, which has a form of its own.

    Args:
        document: the document.

    Returns:
        Title and text, in two lines.
    """
    return f"{document.title}\n{document.text}"


def extend_checksum(state: bytes, document: Document) -> bytes:
    """Chain one more document to the checksum of those before it.

    Args:
        state: checksum so far; empty at the start.
        document: the next.

    Returns:
        16 bytes.
    """
    # With the lengths of the first two texts, no other three texts give the same bytes.
    lengths = f"{len(document.id)} {len(document.title)} "
    return blake2b(state + f"{lengths}{document.id}{document.title}{document.text}".encode(), digest_size=16).digest()


def empty_corpus(name: str) -> UserError:
    """The error for a corpus without a document.

    Args:
        name: of the corpus.

    Returns:
        What to raise.
    """
    return UserError(f"corpus '{name}' is empty; it must hold at least one document")


def repeated_id(place: str, doc_id: str, first: int) -> UserError:
    """The error for an id that occurs twice.

    Args:
        place: file and line of the second.
        doc_id: the id.
        first: line of the first.

    Returns:
        What to raise.
    """
    return UserError(f"{place} repeats the id '{doc_id}' of line {first}; ids must be unique")


def unknown_id(doc_id: str, documents: int) -> UserError:
    """The error for an id that no document has.

    Args:
        doc_id: the id.
        documents: size of the corpus.

    Returns:
        What to raise.
    """
    return UserError(f"none of the {documents} documents has the id '{doc_id}'; give an id of this corpus")
