"""Cache of converted corpus files."""

from __future__ import annotations

import json
import shutil
from hashlib import blake2b
from pathlib import Path

from rich.console import Console

from calibadv.errors import UserError, one_line
from calibadv.io.files import replace_durably, write_atomically
from calibadv.io.jsonl import UnreadableError
from calibadv.retrieval._metadata import read_metadata
from calibadv.retrieval.corpus.arrow import FORMAT, LAYOUT, ArrowCorpus
from calibadv.retrieval.corpus.convert import convert, file_source
from calibadv.retrieval.corpus.integrity import cache_folder, check_digests, compute_digests, record_verified
from calibadv.retrieval.corpus.size import check_disk, free_disk, sample_file

# File with the digests of the converted files; folders of earlier releases lack it.
_DIGESTS = "digests.json"


def cached_corpus(path: Path) -> ArrowCorpus:
    """Open the converted form of a corpus file, converting it at the first call.

    It is stored under ``corpora`` in the folder that CALIBADV_CACHE names, or else in ~/.cache/calibadv. Its name
    depends on the absolute path, size and modification time of the file. Of several concurrent processes, one converts.
    """
    root = cache_folder() / "corpora"
    key = blake2b(f"{FORMAT} {file_source(path).identity}".encode(), digest_size=8).hexdigest()
    folder = root / f"{path.name.partition('.')[0]}-{key}"
    try:
        if not folder.exists():
            root.mkdir(parents=True, exist_ok=True)
            _convert_once(path, folder)
    except OSError as error:
        raise UserError(
            f"corpus '{path}' cannot be converted into '{root}' ({one_line(error)}); set CALIBADV_CACHE to another "
            "folder"
        ) from error
    corpus = ArrowCorpus(folder)
    if (folder / _DIGESTS).exists():
        remedy = f"remove '{folder}', and it is made again"
        names = _files(folder)
        digests = read_metadata(folder / _DIGESTS, dict.fromkeys(names, str), remedy)
        check_digests(folder / _DIGESTS, {name: digests[name] for name in names}, remedy)
    return corpus


def _files(folder: Path) -> list[str]:
    return [LAYOUT, *read_metadata(folder / LAYOUT, {"files": dict}, "")["files"]]


def _convert_once(path: Path, folder: Path) -> None:
    from filelock import FileLock, Timeout

    unfinished = folder.with_suffix(".unfinished")
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        console.print(f"waiting for another process, which converts '{path}' into '{folder}'", markup=False)
        held = lock.acquire()
    with held:
        if folder.exists():  # another process has just converted it
            return
        console.print(f"converting '{path}' once, into '{folder}'", markup=False)
        check_disk(sample_file(path).corpus_bytes, free_disk(unfinished), unfinished)
        try:
            convert(file_source(path), unfinished)
        except UnreadableError:  # perhaps for a moment, as on a network share: keep the converted shards
            raise
        except ValueError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        digests, stamps = compute_digests(unfinished, _files(unfinished))
        write_atomically(unfinished / _DIGESTS, json.dumps(digests, indent=1) + "\n")
        record_verified(unfinished / _DIGESTS, stamps)
        replace_durably(unfinished, folder)
