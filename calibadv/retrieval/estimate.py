"""What an index will cost, before it is built."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from calibadv.errors import UserError
from calibadv.jsonl import unreadable
from calibadv.retrieval.arrow_store import id_hash
from calibadv.retrieval.corpus import empty_corpus, extend_checksum, open_corpus
from calibadv.retrieval.corpus_files import parse_document, read_documents
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
        """What the whole corpus has, where the sampled documents together have ``amount``.

        Args:
            amount: of the sample.

        Returns:
            The amount of the corpus, rounded.
        """
        return round(amount * self.total / len(self.documents))


def sample_corpus(path: str) -> Sample:
    """Look at a part of a corpus.

    Args:
        path: whatever ``open_corpus`` opens. Of a file, megabytes are read and not more.

    Returns:
        The sample.

    Raises:
        UserError: there is no document in it, or no such corpus.
    """
    if Path(path).is_file():
        return sample_file(Path(path))
    corpus = open_corpus(path)
    rows = range(0, len(corpus), _step(len(corpus)))
    documents, seconds = _read(corpus[row] for row in rows)
    return Sample(documents, len(corpus), exact=True, seconds=seconds * len(corpus) / len(documents))


def sample_file(path: Path) -> Sample:
    """Look at a part of a JSON-lines file. Lines that are no documents are passed over here, as converting names them.

    Args:
        path: the file, plain or gzip.

    Returns:
        The sample.

    Raises:
        UserError: there is no document in it, it is a damaged gzip file, or it cannot be read.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP_MAGIC
        lines, share = _packed_lines(path) if packed else _plain_lines(path)
    except OSError as error:
        raise unreadable("corpus", path, error) from error
    documents, seconds = _read(_parsed(lines[:: _step(len(lines))]))
    if documents:
        total = len(lines) / share
    else:
        documents, share = [_first_document(path)], 0
        total = path.stat().st_size / (len(documents[0].text) + 1)
    return Sample(documents, max(1, round(total)), exact=share == 1, seconds=seconds * total / len(documents))


@dataclass(frozen=True, slots=True)
class IndexSize:
    """Size of a FAISS index.

    Attributes:
        fixed: bytes that do not grow with the vectors: centroids of inverted files and of product quantizers.
        per_vector: bytes of each vector; for a type of index that is not known here, those of the vector and a number.
        known: whether the type is known.
        trained: whether it can be filled without training.
        training: bytes of the vectors that it is trained on, where there are so many.
    """

    fixed: int
    per_vector: float
    known: bool
    trained: bool
    training: int


def index_size(index: Any) -> IndexSize:
    """Say how large a FAISS index will be.

    Args:
        index: of ``make_index``, still empty.

    Returns:
        Its size.
    """
    import faiss

    fixed, per_vector = _index_bytes(faiss, index)
    known = per_vector is not None
    # Training takes at least 2 ** 16 vectors, and 64 for each centroid.
    training = max(4 * index.d << 16, 64 * fixed)
    return IndexSize(fixed, 4 * index.d + 8 if per_vector is None else per_vector, known, index.is_trained, training)


def _index_bytes(faiss: Any, index: Any) -> tuple[int, float | None]:
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):  # its matrices are small
        return _index_bytes(faiss, index.index)
    quantizer = getattr(index, "pq", None)
    codebooks = 0 if quantizer is None else 4 * index.d * quantizer.ksub
    if isinstance(index, faiss.IndexIVF):
        # Centroids; and each vector is stored with its number.
        return codebooks + 4 * index.d * index.nlist, index.code_size + 8
    if isinstance(index, faiss.IndexHNSW):
        fixed, stored = _index_bytes(faiss, index.storage)
        below, above = index.hnsw.nb_neighbors(0), index.hnsw.nb_neighbors(1)
        # Links, four bytes each: all at the lowest level, and a share of 1/M in every further one (arXiv 1603.09320).
        return fixed, None if stored is None else stored + 4 * (below + above / (above - 1)) + 12
    size = getattr(index, "code_size", None)
    return codebooks, None if size is None else float(size)


def check_disk(needed: int, free: int, folder: Path) -> None:
    """Refuse to fill a disk.

    Args:
        needed: bytes to write.
        free: bytes that are free.
        folder: where to write.

    Raises:
        UserError: more is needed than is free.
    """
    if needed > free:
        raise UserError(
            f"'{folder}' needs about {decimal(needed)} and its disk has {decimal(free)} free; free "
            f"{decimal(needed - free)} there, or choose a folder on another disk"
        )


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is or will be.

    Args:
        folder: need not be there yet.

    Returns:
        The bytes.
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(existing).free


def peak_memory() -> int:
    """The most memory that this process has had resident.

    Returns:
        Bytes.
    """
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _step(count: int) -> int:
    return max(1, -(-count // _SAMPLE_DOCUMENTS))


def _read(documents: Iterator[Document]) -> tuple[list[Document], float]:
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
