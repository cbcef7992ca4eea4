"""Estimate of the size of a converted corpus, from a sample, and checks of free disk space."""

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
from calibadv.retrieval.corpus.base import empty_corpus_error, extend_checksum
from calibadv.retrieval.corpus.files import parse_document, read_documents
from calibadv.types import Document

_GZIP_MAGIC = b"\x1f\x8b"
# A plain file is sampled in evenly spaced windows of a megabyte, a gzip file at its start.
_WINDOWS, _WINDOW_BYTES = 8, 1 << 20
_SAMPLE_DOCUMENTS = 2000
# Offsets of three texts, a hash, and a hash with its row in ids.npy: eight bytes each.
_ROW_BYTES = 6 * 8
# Seconds of a conversion per second of reading, hashing and summing: measured on a million passages.
_CONVERSION_FACTOR = 1.5


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample of a corpus, with estimates for the whole."""

    documents: list[Document]  # up to 2000 documents, evenly spaced in the part that was read
    total: int  # of the whole corpus
    exact: bool  # counted, not estimated
    seconds: float  # time to convert the whole corpus

    @property
    def corpus_bytes(self) -> int:
        """Size of the converted corpus."""
        texts = sum(len(f"{d.id}{d.title}{d.text}".encode()) for d in self.documents)
        return self.extrapolate(texts) + _ROW_BYTES * self.total

    def extrapolate(self, amount: float) -> int:
        """Scale a sum over the sample to the whole corpus."""
        return round(amount * self.total / len(self.documents))


def sample_file(path: Path) -> Sample:
    """Sample a JSON-lines file, plain or gzip. Invalid lines are skipped: the conversion reports them."""
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == _GZIP_MAGIC
        lines, share = _gzip_lines(path) if compressed else _plain_lines(path)
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
    """Refuse to write more bytes than are free."""
    if needed > free:
        raise UserError(
            f"'{folder}' needs about {decimal(needed)} and its disk has {decimal(free)} free; free "
            f"{decimal(needed - free)} there, or choose a folder on another disk"
        )


def free_disk(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(existing).free


def sample_step(count: int) -> int:
    """Return the distance between sampled rows of a corpus of ``count`` documents."""
    return max(1, -(-count // _SAMPLE_DOCUMENTS))


def read_sample(documents: Iterator[Document]) -> tuple[list[Document], float]:
    """Return the documents, and the seconds that their conversion takes."""
    start = time.perf_counter()
    read = list(documents)
    for document in read:
        extend_checksum(b"", document)
        id_hash(document.id)
    return read, _CONVERSION_FACTOR * (time.perf_counter() - start)


def _parsed(lines: list[bytes]) -> Iterator[Document]:
    for line in lines:
        with suppress(ValueError, AttributeError):  # not JSON, not an object, not a document
            yield parse_document(json.loads(line), "")


def _first_document(path: Path) -> Document:
    """Read the first document if the sample has none: lines are long, or the error of the file is raised."""
    with closing(read_documents(path)) as numbered:
        for _, document in numbered:
            return document
    raise empty_corpus_error(str(path))


def _plain_lines(path: Path) -> tuple[list[bytes], float]:
    """Return lines that are not blank, and the fraction of the file that they were taken from."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WINDOWS * _WINDOW_BYTES:
            return _lines(file.read()), 1
        lines: list[bytes] = []
        read = 0
        for window in range(_WINDOWS):
            file.seek(window * (size - _WINDOW_BYTES) // (_WINDOWS - 1))
            block = file.read(_WINDOW_BYTES)
            # Only whole lines; only the first window starts at the start of a line.
            whole = block[block.find(b"\n") + 1 if window else 0 : block.rfind(b"\n") + 1]
            lines += _lines(whole)
            read += len(whole)
    return lines, read / size


def _gzip_lines(path: Path) -> tuple[list[bytes], float]:
    try:
        with path.open("rb") as compressed, gzip.open(compressed) as file:
            block = file.read(_WINDOWS * _WINDOW_BYTES)
            if len(block) < _WINDOWS * _WINDOW_BYTES:
                return _lines(block), 1
            share = compressed.tell() / path.stat().st_size
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"corpus '{path}' is a damaged gzip file; copy it again") from error
    whole = block[: block.rfind(b"\n") + 1]
    return _lines(whole), share * len(whole) / len(block)


def _lines(block: bytes) -> list[bytes]:
    return [line for line in block.split(b"\n") if line and not line.isspace()]
