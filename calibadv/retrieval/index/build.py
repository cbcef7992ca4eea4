"""The command ``calibadv index``: build an index folder, resumably, or verify one."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from calibadv.errors import UserError, one_line
from calibadv.io.files import remove, replace_durably, write_atomically
from calibadv.io.jsonl import UnreadableError
from calibadv.retrieval._metadata import read_metadata
from calibadv.retrieval.corpus.base import Corpus
from calibadv.retrieval.corpus.convert import Source, convert
from calibadv.retrieval.corpus.size import Sample, check_disk, free_disk
from calibadv.retrieval.corpus.text_folder import PassageSize
from calibadv.retrieval.index.builders import BM25Builder, FaissBuilder, IndexBuilder
from calibadv.retrieval.index.cost import IndexCost
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

# Folder of partial results. It and the plan in UNFINISHED are removed at the end.
_WORK = "partial"
_BUILDERS: dict[Backend, Callable[..., IndexBuilder]] = {"bm25": BM25Builder, "faiss": FaissBuilder}
# Options that may change when a build is resumed, since the result is the same up to rounding.
_CHANGEABLE = ("batch_size", "device")


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
    passage_words: int = 100,
    passage_overlap: int = 20,
    verify: Path | None = None,
) -> None:
    """Build an index for BM25 or Dense. After a kill, the same command resumes where it stopped.

    Args:
        corpus: JSON-lines file, plain or gzip; folder of text files (.txt, .md), or of an index, to index its corpus
            again; or 'embedded'. Required to build.
        out: Folder to write; it must be empty, not exist, or have been begun by the same command. Required to build.
        backend: 'bm25' searches by words, 'faiss' by meaning. Required to build.
        encoder: For faiss: 'minilm' (the default), or a folder or hub name of sentence-transformers.
        factory: For faiss: index type as faiss.index_factory reads it, such as 'IVF4096,Flat' or 'HNSW32'; 'Flat' by
            default.
        stopwords: For bm25: a language that bm25s knows ('english' by default), 'none', or a list of words.
        stemmer: For bm25: a language of PyStemmer; no stemming by default.
        batch_size: For faiss: passages that are encoded together, 64 by default.
        device: For faiss: device of the encoder, such as 'cuda'; an accelerator by default, if there is one.
        query_prompt: For faiss: text put before queries; the encoder's own by default.
        passage_prompt: For faiss: text put before passages; the encoder's own by default.
        passage_words: For a folder of text files: words of the passages that a longer text is cut into.
        passage_overlap: For a folder of text files: words that a passage shares with the one before it.
        verify: Index to compare with the digests of its build, instead of building one.
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
        raise _missing_options([f"--{name} VALUE" for name, value in needed.items() if value is None])
    else:
        _build_folder(corpus, out, backend, options, PassageSize(passage_words, passage_overlap))


def _missing_options(missing: list[str]) -> UserError:
    are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
    return UserError(f"{' and '.join(missing)} {are} missing; give {them}, or --verify DIR alone to check an index")


def _verify(folder: Path, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise UserError(f"--verify checks an index that is there, and --{name} is for building one; leave one out")
    manifest = verify_index(folder)
    size = decimal(sum(manifest.files.values()))
    Console(soft_wrap=True, highlight=False).print(
        f"index '{folder}' is whole: {len(manifest.files)} files, {size}", markup=False
    )


def _build_folder(corpus: str, out: Path, backend: Backend, given: dict[str, Any], passages: PassageSize) -> None:
    options = _builder_options(backend, given)
    source = open_source(corpus, passages)
    plan = {"corpus": source.identity, "backend": backend, **options}
    for name in _CHANGEABLE:
        plan.pop(name, None)
    if not _is_built(out, plan):
        builder = _BUILDERS[backend](**options)
        sample = sample_corpus(corpus, passages)
        if sample.exact:
            builder.check(sample.total)
        _print_estimate(sample, builder.cost(sample), out)
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    with _resumable(out), _locked(out):
        if not _is_built(out, plan):
            documents = _convert(source, builder, out, plan, missing)
            _build(builder, documents, out)
            write_manifest(out, backend, documents, builder.settings)
        shutil.rmtree(out / _WORK)
        (out / UNFINISHED).unlink()


def _builder_options(backend: Backend, given: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a backend, with defaults for those that were not given."""
    own = {option.name: option.default for option in inspect.signature(_BUILDERS[backend]).parameters.values()}
    for name in given:
        if name not in own:
            other = next(other for other in _BUILDERS if other != backend)
            raise UserError(f"--{name} is an option of --backend {other}, and this is {backend}; leave one of them out")
    options = {**own, **given}
    folder = Path(options.get("encoder", "minilm")).expanduser()
    if folder.is_dir() and str(folder) != "minilm":
        # The index may be opened from another working folder.
        options["encoder"] = str(folder.absolute())
    return options


def _is_built(out: Path, plan: dict[str, Any]) -> bool:
    """Tell if only the removal of partial results is left; refuse a folder with anything but this plan's files."""
    begun = read_metadata(out / UNFINISHED, {}, "remove the folder") if (out / UNFINISHED).exists() else None
    if (out / MANIFEST).exists():
        if begun != plan:
            raise UserError(f"out '{out}' holds a finished index; name another folder, or remove it")
        return True
    if begun is not None:
        _check_plan(out, begun, plan)
    elif out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {_WORK}):
        raise UserError(f"out '{out}' is not an empty folder; name another folder, or remove it")
    return False


def _check_plan(out: Path, begun: dict[str, Any], plan: dict[str, Any]) -> None:
    changed = [name for name in {**begun, **plan} if begun.get(name) != plan.get(name)]
    if changed:
        was, now = (", ".join(f"{name} {content.get(name)}" for name in changed) for content in (begun, plan))
        raise UserError(f"out '{out}' was begun with {was}, and this is {now}; give what it was, or remove the folder")


def _print_estimate(sample: Sample, cost: IndexCost, out: Path) -> None:
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
    existing = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    check_disk(peak - existing, free_disk(out), out)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Turn a disk error during the build into advice to resume it."""
    try:
        yield
    except OSError as error:
        if not (out / UNFINISHED).exists():
            raise
        raise UserError(
            f"out '{out}' cannot be written ({one_line(error)}); free space there, and run the same command again to "
            "go on where it stopped"
        ) from error


def _locked(out: Path) -> AbstractContextManager[object]:
    from filelock import FileLock, Timeout

    (out / _WORK).mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(out / _WORK / "lock").acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another process is writing to out '{out}'; wait for it, or name another folder") from error


def _convert(source: Source, builder: IndexBuilder, out: Path, plan: dict[str, Any], missing: list[Path]) -> Corpus:
    """Convert the corpus. If it is invalid, remove all files, and the folders that did not exist before."""
    write_atomically(out / UNFINISHED, json.dumps(plan), partial=out / _WORK / UNFINISHED)
    try:
        documents = convert(source, out / CORPUS_FOLDER)
        builder.check(len(documents))
    except UnreadableError:  # perhaps for a moment, as on a network share: keep the converted shards
        raise
    except ValueError:
        shutil.rmtree(out / CORPUS_FOLDER)
        (out / UNFINISHED).unlink()
        shutil.rmtree(out / _WORK)
        for folder in missing:
            folder.rmdir()
        raise
    return documents


def _build(builder: IndexBuilder, documents: Corpus, out: Path) -> None:
    name = INDEX_NAMES[builder.name]
    target, partial = out / name, out / _WORK / name
    if target.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
    try:
        builder.build(documents, partial, out / _WORK)
        replace_durably(partial, target)
    finally:  # a partial index may be large, and cannot be resumed
        if partial.exists():
            remove(partial)
