"""A corpus as memory-mapped Arrow files: any size in constant memory.

The folder holds ``shard-00000.arrow`` and so on, in record batches of a fixed number of rows, so that a row is located
by arithmetic; ``ids.npy``, [2, N] 64-bit hashes of the ids in ascending order and the row of each; and
``corpus.json``, which is written last.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from calibadv.errors import UserError, one_line
from calibadv.retrieval._metadata import KeyTypes, check_metadata, read_metadata
from calibadv.retrieval.corpus.base import Corpus, unknown_id_error
from calibadv.retrieval.corpus.integrity import check_names, check_sizes
from calibadv.types import Document

FORMAT = 1
TEXTS = ("id", "title", "text")
LAYOUT, IDS = "corpus.json", "ids.npy"
_KEY_TYPES: KeyTypes = {"documents": int, "checksum": str, "shard_rows": int, "batch_rows": int, "files": dict}
_REMEDY = "copy the folder again, or remove it and have it made again"


class ArrowCorpus(Corpus):
    """A corpus in a folder that ``convert`` wrote, memory-mapped; UserError if the folder is incomplete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        layout = _read_layout(folder)
        self._documents: int = layout["documents"]
        self._checksum: str = layout["checksum"]
        self._shard_rows: int = layout["shard_rows"]
        self._batch_rows: int = layout["batch_rows"]
        ids = _load_ids(folder / IDS, self._documents)
        # Plain arrays over the same mapped memory: searching them reads a few pages and copies nothing.
        self._hashes, self._rows = np.asarray(ids[0]), np.asarray(ids[1])
        self._shards: dict[int, list[Any]] = {}

    def __len__(self) -> int:
        return self._documents

    def __iter__(self) -> Iterator[Document]:
        return self._stream(0, len(self))

    @override
    def _read(self, rows: range) -> list[Document]:
        if rows.step == 1:
            return list(self._stream(rows.start, rows.stop))
        return [document for row in rows for document in self._stream(row, row + 1)]

    def _stream(self, start: int, stop: int) -> Iterator[Document]:
        while start < stop:
            batch, offset = self._batch(start)
            part = batch.slice(offset, min(batch.num_rows - offset, stop - start))
            try:
                columns = [part.column(name).to_pylist() for name in TEXTS]
            except UnicodeDecodeError as error:
                raise _damaged(self.folder / shard_name(start // self._shard_rows), one_line(error)) from error
            yield from map(Document, *columns)
            start += part.num_rows

    def _batch(self, row: int) -> tuple[Any, int]:
        shard, within = divmod(row, self._shard_rows)
        batch, offset = divmod(within, self._batch_rows)
        if shard not in self._shards:
            rows = min(self._shard_rows, len(self) - shard * self._shard_rows)
            self._shards[shard] = open_shard(self.folder, shard, rows, self._batch_rows)
        return self._shards[shard][batch], offset

    @override
    def row(self, doc_id: str) -> int:
        wanted = id_hash(doc_id)
        position = int(np.searchsorted(self._hashes, np.uint64(wanted)))
        while position < len(self) and self._hashes[position] == wanted:
            row = int(self._rows[position])
            if self[row].id == doc_id:
                return row
            position += 1
        raise unknown_id_error(doc_id, len(self))

    @property
    @override
    def checksum(self) -> str:
        return self._checksum


def id_hash(doc_id: str) -> int:
    """Return the 64-bit hash of an id, the same on every machine."""
    return int.from_bytes(blake2b(doc_id.encode(), digest_size=8).digest(), "little")


def open_shard(folder: Path, shard: int, rows: int, batch_rows: int) -> list[Any]:
    """Open a shard as memory-mapped record batches."""
    import pyarrow as pa  # type: ignore[import-untyped]

    path = folder / shard_name(shard)
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        if [batch.num_rows for batch in batches] != [min(batch_rows, rows - at) for at in range(0, rows, batch_rows)]:
            raise UserError("it has other rows")
        for batch in batches:
            batch.validate()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, one_line(error)) from error
    return batches


def shard_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{shard:05d}.arrow"


def _read_layout(folder: Path) -> dict[str, Any]:
    path = folder / LAYOUT
    layout = read_metadata(path, {}, _REMEDY)
    if layout.get("format") != FORMAT:
        raise UserError(f"'{folder}' has the corpus format {layout.get('format')}, not {FORMAT}; {_REMEDY}")
    check_metadata(path, layout, _KEY_TYPES, _REMEDY)
    shards = -(-layout["documents"] // layout["shard_rows"])
    check_names(path, layout["files"], [*map(shard_name, range(shards)), IDS], _REMEDY)
    check_sizes(folder, layout["files"], _REMEDY)
    return layout


def _load_ids(path: Path, documents: int) -> Any:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:  # numpy's text may call it a pickle
        raise _damaged(path, "it is no array of numpy") from error
    if ids.dtype != np.uint64 or ids.shape != (2, documents):
        raise _damaged(path, f"it holds {ids.dtype} {list(ids.shape)}")
    return ids


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"'{path}' is damaged ({reason}); {_REMEDY}")
