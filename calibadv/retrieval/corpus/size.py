"""The size of a corpus once it is converted, estimated from a sample."""

from __future__ import annotations

import gzip
import json
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from calibadv.errors import UserError
from calibadv.io.jsonl import unreadable
from calibadv.retrieval.corpus.arrow import id_hash
from calibadv.retrieval.corpus.base import empty_corpus, extend_checksum
from calibadv.retrieval.corpus.files import parse_document, read_documents
from calibadv.types import Document

_GZIP_MAGIC = b"\x1f\x8b"


# A file is sampled in windows of a megabyte, spread evenly, and a packed one at its start.
_WINDOWS, _WINDOW_BYTES = 8, 1 << 20
_SAMPLE_DOCUMENTS = 2000


# Offsets of three texts, a hash, and a hash with its row in ids.npy: eight bytes each.
_ROW_BYTES = 6 * 8


# Writing and sorting take half as long again as reading, hashing and summing: measured on a million passages.
_WRITING = 1.5


@dataclass(frozen=True, slots=True)
class Sample:
    """Some documents of a corpus, and what they say of all.

    Attributes:
        documents: up to 2000, spread over what was looked at.
        total: documents of the whole corpus.
        exact: whether ``total`` was counted, not estimated.
        seconds: to convert the whole corpus.
    """

    documents: list[Document]
    total: int
    exact: bool
    seconds: float

    @property
    def corpus_bytes(self) -> int:
        """Size of the corpus once it is converted."""
        texts = sum(len(f"{d.id}{d.title}{d.text}".encode()) for d in self.documents)
        return self.scale(texts) + _ROW_BYTES * self.total

    def scale(self, amount: float) -> int:
        """What the whole corpus has, where the sampled documents together have ``amount``."""
        return round(amount * self.total / len(self.documents))


def sample_file(path: Path) -> Sample:
    """Sample a JSON-lines file, plain or gzip. Lines that are no documents are skipped: converting names them."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP_MAGIC
        lines, share = _packed_lines(path) if packed else _plain_lines(path)
    except OSError as error:
        raise unreadable("corpus", path, error) from error
    documents, seconds = read_sample(_parsed(lines[:: sample_step(len(lines))]))
    if documents:
        total = len(lines) / share
    else:
        documents, share = [_first_document(path)], 0
        total = path.stat().st_size / (len(documents[0].text) + 1)
    return Sample(documents, max(1, round(total)), exact=share == 1, seconds=seconds * total / len(documents))


def check_disk(needed: int, free: int, folder: Path) -> None:
    """Refuse to fill a disk."""
    if needed > free:
        raise UserError(
            f"'{folder}' needs about {decimal(needed)} and its disk has {decimal(free)} free; free "
            f"{decimal(needed - free)} there, or choose a folder on another disk"
        )


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(existing).free


def sample_step(count: int) -> int:
    """The distance between sampled rows of a corpus."""
    return max(1, -(-count // _SAMPLE_DOCUMENTS))


def read_sample(documents: Iterator[Document]) -> tuple[list[Document], float]:
    """The documents, and the seconds that they cost a conversion."""
    start = time.perf_counter()
    read = list(documents)
    for document in read:
        extend_checksum(b"", document)
        id_hash(document.id)
    return read, _WRITING * (time.perf_counter() - start)


def _parsed(lines: list[bytes]) -> Iterator[Document]:
    for line in lines:
        with suppress(ValueError, AttributeError):  # not JSON, not an object, not a document
            yield parse_document(json.loads(line), "")


def _first_document(path: Path) -> Document:
    """For a file in which no whole line was seen: its lines are long, or it is empty or wrong, which this says."""
    with closing(read_documents(path)) as numbered:
        for _, document in numbered:
            return document
    raise empty_corpus(str(path))


def _plain_lines(path: Path) -> tuple[list[bytes], float]:
    """Lines that are not blank, and the share of the file that they were taken from."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WINDOWS * _WINDOW_BYTES:
            return _lines(file.read()), 1
        lines: list[bytes] = []
        seen = 0
        for window in range(_WINDOWS):
            file.seek(window * (size - _WINDOW_BYTES) // (_WINDOWS - 1))
            block = file.read(_WINDOW_BYTES)
            # Only whole lines; the first window starts with one.
            whole = block[block.find(b"\n") + 1 if window else 0 : block.rfind(b"\n") + 1]
            lines += _lines(whole)
            seen += len(whole)
    return lines, seen / size


def _packed_lines(path: Path) -> tuple[list[bytes], float]:
    try:
        with path.open("rb") as packed, gzip.open(packed) as file:
            block = file.read(_WINDOWS * _WINDOW_BYTES)
            if len(block) < _WINDOWS * _WINDOW_BYTES:
                return _lines(block), 1
            share = packed.tell() / path.stat().st_size
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"corpus '{path}' is a damaged gzip file; copy it again") from error
    whole = block[: block.rfind(b"\n") + 1]
    return _lines(whole), share * len(whole) / len(block)


def _lines(block: bytes) -> list[bytes]:
    return [line for line in block.split(b"\n") if line and not line.isspace()]
