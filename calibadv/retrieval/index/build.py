"""What ``calibadv index`` does: a corpus becomes a folder that retrievers open, resumably."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from calibadv.errors import UserError, one_line
from calibadv.io.files import remove, replace_durably, write_atomically
from calibadv.io.jsonl import UnreadableError
from calibadv.retrieval._metadata import read_record
from calibadv.retrieval.corpus.arrow import ArrowCorpus
from calibadv.retrieval.corpus.convert import Source, convert
from calibadv.retrieval.corpus.size import Sample, check_disk, free_disk
from calibadv.retrieval.index.builders import BM25Index, Cost, FaissIndex, IndexBackend
from calibadv.retrieval.index.manifest import (
    CORPUS_FOLDER,
    INDEX_NAMES,
    MANIFEST,
    UNFINISHED,
    Backend,
    verify_index,
    write_manifest,
)
from calibadv.retrieval.index.open import open_source, sample_corpus

# Folder of what is not whole yet. All of it, and the plan in UNFINISHED, is removed at the end.
_WORK = "partial"
_KINDS: dict[Backend, Callable[..., IndexBackend]] = {"bm25": BM25Index, "faiss": FaissIndex}
# What may be another after a kill, as the result is the same up to rounding.
_FREE = ("batch_size", "device")


def index(  # noqa: PLR0913 - its parameters are the options of the command
    corpus: str | None = None,
    out: Path | None = None,
    backend: Backend | None = None,
    encoder: str | None = None,
    factory: str | None = None,
    stopwords: str | list[str] | None = None,
    stemmer: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    verify: Path | None = None,
) -> None:
    """Build an index, which BM25 or Dense opens. After a kill, the same command goes on where it stopped.

    Args:
        corpus: JSON-lines file, plain or gzip; a folder of an index, whose corpus is taken; or 'embedded'. Needed to
            build.
        out: Folder to write; it must be empty, not there, or begun by the same command. Needed to build.
        backend: 'bm25' searches by words, 'faiss' by meaning. Needed to build.
        encoder: Of faiss: 'minilm' (the default), or a folder or hub name of sentence-transformers.
        factory: Of faiss: index type as faiss.index_factory reads it, such as 'IVF4096,Flat' or 'HNSW32'; 'Flat' by
            default.
        stopwords: Of bm25: a language that bm25s knows ('english' by default), 'none', or a list of words.
        stemmer: Of bm25: a language of PyStemmer; no stemming by default.
        batch_size: Of faiss: passages that are encoded together, 64 by default.
        device: Of faiss: where the encoder runs, such as 'cuda'; the best one that there is by default.
        query_prompt: Of faiss: put before queries; what the encoder declares by default.
        passage_prompt: Of faiss: put before passages; what the encoder declares by default.
        verify: Index to read whole and compare with the digests of its build, in the place of building one.

    Raises:
        UserError: the corpus holds a mistake, the folder holds something else, the disk is too small, an option is
            missing, wrong or belongs to the other backend, or the index to verify is damaged.
    """
    options = {
        "encoder": encoder,
        "factory": factory,
        "stopwords": stopwords,
        "stemmer": stemmer,
        "batch_size": batch_size,
        "device": device,
        "query_prompt": query_prompt,
        "passage_prompt": passage_prompt,
    }
    options = {name: value for name, value in options.items() if value is not None}
    needed = {"corpus": corpus, "out": out, "backend": backend}
    if verify is not None:
        _verify(verify, {**needed, **options})
    elif corpus is None or out is None or backend is None:
        missing = [f"--{name} VALUE" for name, value in needed.items() if value is None]
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise UserError(f"{' and '.join(missing)} {are} missing; give {them}, or --verify DIR alone to check an index")
    else:
        _make(corpus, out, backend, options)


def _verify(folder: Path, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise UserError(f"--verify checks an index that is there, and --{name} is for building one; leave one out")
    manifest = verify_index(folder)
    size = decimal(sum(manifest.files.values()))
    Console(soft_wrap=True, highlight=False).print(
        f"index '{folder}' is whole: {len(manifest.files)} files, {size}", markup=False
    )


def _make(corpus: str, out: Path, backend: Backend, given: dict[str, Any]) -> None:
    options = _own_options(backend, given)
    source = open_source(corpus)
    plan = {"corpus": source.identity, "backend": backend, **options}
    for name in _FREE:
        plan.pop(name, None)
    if not _is_finished(out, plan):
        kind = _KINDS[backend](**options)
        sample = sample_corpus(corpus)
        if sample.exact:
            kind.check(sample.total)
        _announce(sample, kind.cost(sample), out)
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    with _resumable(out), _locked(out):
        if not _is_finished(out, plan):
            documents = _convert(source, kind, out, plan, missing)
            _build(kind, documents, out)
            write_manifest(out, backend, documents, kind.settings)
        shutil.rmtree(out / _WORK)
        (out / UNFINISHED).unlink()


def _own_options(backend: Backend, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a backend, those that were not given at their defaults."""
    own = {option.name: option.default for option in inspect.signature(_KINDS[backend]).parameters.values()}
    for name in given:
        if name not in own:
            other = next(other for other in _KINDS if other != backend)
            raise UserError(f"--{name} is an option of --backend {other}, and this is {backend}; leave one of them out")
    options = {**own, **given}
    folder = Path(options.get("encoder", "minilm")).expanduser()
    if folder.is_dir() and str(folder) != "minilm":
        # Whoever opens the index may do so from another folder.
        options["encoder"] = str(folder.absolute())
    return options


def _is_finished(out: Path, plan: dict[str, Any]) -> bool:
    """Whether only the sweeping is left; refuses a folder that holds anything else than this plan's work."""
    begun = read_record(out / UNFINISHED, {}, "remove the folder") if (out / UNFINISHED).exists() else None
    if (out / MANIFEST).exists():
        if begun == plan:
            return True
        raise UserError(f"out '{out}' holds a finished index; name another folder, or remove it")
    if begun is None:
        if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {_WORK}):
            raise UserError(f"out '{out}' is not an empty folder; name another folder, or remove it")
    elif begun != plan:
        names = [name for name in {**begun, **plan} if begun.get(name) != plan.get(name)]
        was, now = (", ".join(f"{name} {content.get(name)}" for name in names) for content in (begun, plan))
        raise UserError(f"out '{out}' was begun with {was}, and this is {now}; give what it was, or remove the folder")
    return False


def _announce(sample: Sample, cost: Cost, out: Path) -> None:
    """Print the estimate, and refuse a disk that is too small for it."""
    kept = sample.corpus_bytes + cost.index_bytes
    peak = kept + cost.temporary_bytes
    seconds = round(sample.seconds + cost.seconds)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"index '{out}' needs, roughly:", markup=False)
    table = Table(show_header=False)
    table.add_row("documents", f"{'' if sample.exact else 'about '}{sample.total:,}")
    table.add_row("disk", decimal(kept) + (f", and {decimal(peak)} while it is built" if peak > kept else ""))
    table.add_row("memory", decimal(cost.memory_bytes))
    table.add_row("time", f"{timedelta(seconds=seconds)} (h:mm:ss)" if seconds else "about a second")
    if cost.unknown:
        table.add_row("not counted", cost.unknown)
    console.print(table)
    there = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    check_disk(peak - there, free_disk(out), out)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Where the disk fails once the work has begun, say that it can go on."""
    try:
        yield
    except OSError as error:
        if not (out / UNFINISHED).exists():
            raise
        raise UserError(
            f"out '{out}' cannot be written ({one_line(error)}); free space there, and run the same command again to "
            "go on where it stopped"
        ) from error


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    (out / _WORK).mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / _WORK / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another process is writing to out '{out}'; wait for it, or name another folder") from error
    try:
        yield
    finally:
        lock.release()


def _convert(source: Source, kind: IndexBackend, out: Path, plan: dict[str, Any], missing: list[Path]) -> ArrowCorpus:
    """Convert the corpus. If it will not do, nothing of the index remains, nor the folders that were missing."""
    write_atomically(out / UNFINISHED, json.dumps(plan), partial=out / _WORK / UNFINISHED)
    try:
        documents = convert(source, out / CORPUS_FOLDER)
        kind.check(len(documents))
    except UnreadableError:  # as a share that is away for a moment: what was converted stays
        raise
    except ValueError:
        shutil.rmtree(out / CORPUS_FOLDER)
        (out / UNFINISHED).unlink()
        shutil.rmtree(out / _WORK)
        for folder in missing:
            folder.rmdir()
        raise
    return documents


def _build(kind: IndexBackend, documents: ArrowCorpus, out: Path) -> None:
    name = INDEX_NAMES[kind.name]
    target, partial = out / name, out / _WORK / name
    if target.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        kind.build(documents, partial, out / _WORK)
        replace_durably(partial, target)
    finally:  # it may be large, and is not gone on with
        if partial.exists():
            remove(partial)
