"""Resumable conversion of a corpus to Arrow files.

A killed conversion resumes after its last complete shard, which ``progress.json`` records until the folder is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from calibadv.io.files import replace_durably, save_array, write_atomically
from calibadv.retrieval._metadata import read_metadata
from calibadv.retrieval.corpus.arrow import FORMAT, IDS, LAYOUT, TEXTS, ArrowCorpus, id_hash, open_shard, shard_name
from calibadv.retrieval.corpus.base import duplicate_id_error, empty_corpus_error, extend_checksum
from calibadv.retrieval.corpus.files import read_documents
from calibadv.types import Document

_SHARD_ROWS = 1 << 18
BATCH_ROWS = 1 << 12
_PROGRESS = "progress.json"
# From this many documents on, sorting takes more than about two seconds.
_LARGE_CORPUS = 5_000_000

NumberedDocuments = Generator[tuple[int, Document], None, None]
"""Documents with their numbers in the source, such as line numbers."""


@dataclass(frozen=True, slots=True)
class Source:
    """A source of documents."""

    name: str  # in messages
    identity: dict[str, Any]  # values that change with the documents: path, size and modification time of a file
    read: Callable[[int], NumberedDocuments]  # documents with a number above the given one; numbers ascend from 1


@dataclass(frozen=True, slots=True)
class _Progress:
    """Progress: finished shards and documents, number of the last document in the source, checksum so far."""

    shards: int = 0
    documents: int = 0
    number: int = 0
    checksum: str = ""


def file_source(path: Path) -> Source:
    """Return the source for a JSON-lines file."""
    status = path.stat()
    identity = {"path": str(path.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return Source(str(path), identity, partial(read_documents, path))


def convert(source: Source, folder: Path, shard_rows: int = _SHARD_ROWS) -> ArrowCorpus:
    """Write a corpus into a folder, resuming after the last complete shard of a killed conversion."""
    if not (folder / LAYOUT).exists():
        layout = {"format": FORMAT, "shard_rows": shard_rows, "batch_rows": min(BATCH_ROWS, shard_rows)}
        progress = _write_shards(source, folder, layout)
        if not progress.documents:
            raise empty_corpus_error(source.name)
        _write_ids(source, folder, layout, progress)
        files = {name: (folder / name).stat().st_size for name in [*map(shard_name, range(progress.shards)), IDS]}
        content = {**layout, "documents": progress.documents, "checksum": progress.checksum, "files": files}
        write_atomically(folder / LAYOUT, json.dumps(content, indent=2) + "\n")
    (folder / _PROGRESS).unlink(missing_ok=True)
    return ArrowCorpus(folder)


def _write_shards(source: Source, folder: Path, layout: dict[str, Any]) -> _Progress:
    header = {"source": source.identity, "layout": layout}
    progress = _read_progress(folder, header)
    if progress is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        progress = _Progress()
    with closing(source.read(progress.number)) as numbered:
        while progress.documents == progress.shards * layout["shard_rows"]:
            extended = _write_shard(folder, numbered, layout, progress)
            if extended == progress:
                break
            progress = extended
            write_atomically(folder / _PROGRESS, json.dumps({**header, "progress": asdict(progress)}))
    return progress


def _read_progress(folder: Path, header: dict[str, Any]) -> _Progress | None:
    """Return the progress of an earlier conversion with the same header; None if there is none or it is damaged."""
    try:
        content = read_metadata(folder / _PROGRESS, {"progress": dict}, "")
        progress = _Progress(**content.pop("progress"))
    except (ValueError, TypeError):  # missing or damaged: converting from the start costs only time
        return None
    return progress if content == header else None


def _write_shard(folder: Path, numbered: NumberedDocuments, layout: dict[str, Any], progress: _Progress) -> _Progress:
    """Write the next shard atomically; return ``progress`` itself if no documents are left."""
    import pyarrow as pa  # type: ignore[import-untyped]

    schema = pa.schema([*((name, pa.large_string()) for name in TEXTS), ("hash", pa.uint64())])
    path = folder / shard_name(progress.shards)
    partial = path.with_suffix(".partial")
    documents, number, state = progress.documents, progress.number, bytes.fromhex(progress.checksum)
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for _ in range(layout["shard_rows"] // layout["batch_rows"]):
                rows = list(islice(numbered, layout["batch_rows"]))
                if not rows:
                    break
                for number, document in rows:  # noqa: B007 - the last number is kept
                    state = extend_checksum(state, document)
                columns: list[list[Any]] = [[getattr(document, name) for _, document in rows] for name in TEXTS]
                columns.append([id_hash(document.id) for _, document in rows])
                arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
                documents += len(rows)
        if documents == progress.documents:
            return progress
        replace_durably(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return _Progress(progress.shards + 1, documents, number, state.hex())


def _write_ids(source: Source, folder: Path, layout: dict[str, Any], progress: _Progress) -> None:
    total, per_shard, batch_rows = progress.documents, layout["shard_rows"], layout["batch_rows"]
    shards = [
        open_shard(folder, shard, min(per_shard, total - shard * per_shard), batch_rows)
        for shard in range(progress.shards)
    ]
    ids = np.empty((2, total), np.uint64)
    ids[0] = np.concatenate([batch.column("hash").to_numpy() for batches in shards for batch in batches])
    with Console(stderr=True, quiet=total < _LARGE_CORPUS).status("Sorting the ids"):
        ids[1] = np.argsort(ids[0], kind="stable")
        ids[0] = ids[0][ids[1]]

    def id_of(row: int) -> str:
        shard, within = divmod(row, per_shard)
        return str(shards[shard][within // batch_rows].column("id")[within % batch_rows].as_py())

    duplicate = find_duplicate(ids[0], ids[1], id_of)
    if duplicate:
        first, second = (_number_of(source, row) for row in duplicate)
        raise duplicate_id_error(f"{source.name}:{second}", id_of(duplicate[1]), first)
    save_array(folder / IDS, ids)


def find_duplicate(
    hashes: NDArray[np.uint64], rows: NDArray[np.uint64], id_of: Callable[[int], str]
) -> tuple[int, int] | None:
    """Return the first row that repeats an id, after the row that has it first. Ids with equal hashes are compared."""
    positions = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    for position in positions[np.argsort(rows[positions])]:
        row = int(rows[position])
        for earlier in rows[np.searchsorted(hashes, hashes[position]) : position]:
            if id_of(int(earlier)) == id_of(row):
                return int(earlier), row
    return None


def _number_of(source: Source, row: int) -> int:
    with closing(source.read(0)) as numbered:
        number, _ = next(islice(numbered, row, None))
    return number
