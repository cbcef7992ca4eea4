"""The manifest of an index folder: ``manifest.json``, which ``calibadv index`` writes last.

Beside it are ``corpus/`` (Arrow files) and ``bm25/`` or ``faiss.index``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from calibadv.errors import UserError
from calibadv.io.files import write_atomically
from calibadv.retrieval._metadata import KeyTypes, check_metadata, read_metadata
from calibadv.retrieval.corpus.arrow import IDS, LAYOUT, ArrowCorpus
from calibadv.retrieval.corpus.base import Corpus
from calibadv.retrieval.corpus.integrity import (
    check_digests,
    check_names,
    check_sizes,
    compute_digests,
    record_verified,
    verify_digests,
)

FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
"""File with the options of a build that is not finished."""

Backend = Literal["bm25", "faiss"]
CORPUS_FOLDER = "corpus"
INDEX_NAMES: dict[Backend, str] = {"bm25": "bm25", "faiss": "faiss.index"}
_REMEDY = "copy the folder again, or build the index anew with 'calibadv index'"
_KEY_TYPES: KeyTypes = {"backend": str, "documents": int, "corpus_checksum": str, "settings": dict, "files": dict}
_SETTING_TYPES: dict[str, KeyTypes] = {
    "bm25": {"stopwords": str | list, "stemmer": str | NoneType},
    "faiss": {"encoder": str, "query_prompt": str, "passage_prompt": str, "factory": str, "dimension": int},
}
_FILES = {
    "bm25": [f"bm25/{part}.csc.index.npy" for part in ("data", "indices", "indptr")]
    + ["bm25/params.index.json", "bm25/vocab.index.json"],
    "faiss": ["faiss.index"],
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of an index folder and the settings of its build."""

    backend: Backend
    documents: int
    corpus_checksum: str
    settings: dict[str, Any]  # of the backend
    files: dict[str, int]  # bytes of every file, by its path within the folder
    digests: dict[str, str] = field(default_factory=dict)  # BLAKE2b, by the same paths; empty for an earlier release


def write_manifest(folder: Path, backend: Backend, corpus: Corpus, settings: dict[str, Any]) -> Manifest:
    """Write the manifest of a folder that is otherwise complete, reading all files for their digests."""
    index = folder / INDEX_NAMES[backend]
    paths = [*(folder / CORPUS_FOLDER).iterdir(), *(index.iterdir() if index.is_dir() else [index])]
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(paths)}
    digests, stats = compute_digests(folder, files)
    manifest = Manifest(backend, len(corpus), corpus.checksum, settings, files, digests)
    write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2) + "\n")
    record_verified(folder / MANIFEST, stats)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read and validate the manifest of an index; ``open_index`` compares it with the folder."""
    path = _find_manifest(folder)
    content = read_metadata(path, {}, _REMEDY)
    if content.pop("format", None) != FORMAT:
        raise UserError(f"'{path}' is not a manifest of format {FORMAT}, which this release reads; {_REMEDY}")
    check_metadata(path, content, {**_KEY_TYPES, "digests": dict} if "digests" in content else _KEY_TYPES, _REMEDY)
    try:
        manifest = Manifest(**content)
    except TypeError as error:
        raise UserError(f"'{path}' is damaged ({error}); {_REMEDY}") from error
    if manifest.backend not in _SETTING_TYPES:
        raise UserError(f"'{path}' has the backend {manifest.backend!r}; {_REMEDY}")
    check_metadata(path, manifest.settings, _SETTING_TYPES[manifest.backend], _REMEDY)
    names = [f"{CORPUS_FOLDER}/{name}" for name in (LAYOUT, IDS)] + _FILES[manifest.backend]
    check_names(path, manifest.files, names, _REMEDY)
    if "digests" in content and set(manifest.digests) != set(manifest.files):
        raise UserError(f"'{path}' is damaged (its digests are not those of its files); {_REMEDY}")
    return manifest


def open_index(folder: Path) -> tuple[Manifest, Corpus]:
    """Open the corpus of an index, and check that the folder is complete and undamaged.

    Only files that were copied or changed since they were last verified are compared with their digests.
    """
    manifest = read_manifest(folder)
    check_sizes(folder, manifest.files, _REMEDY)
    check_digests(folder / MANIFEST, manifest.digests, _REMEDY)
    corpus = ArrowCorpus(folder / CORPUS_FOLDER)
    found, built = (len(corpus), corpus.checksum), (manifest.documents, manifest.corpus_checksum)
    if found != built:
        raise UserError(
            f"the corpus in '{folder}' has {found[0]} documents with checksum {found[1]}, and the index was built of "
            f"{built[0]} with {built[1]}; {_REMEDY}"
        )
    return manifest, corpus


def verify_index(folder: Path) -> Manifest:
    """Compare all files of an index with the digests of its build."""
    manifest = read_manifest(folder)
    if not manifest.digests:
        raise UserError(
            f"index '{folder}' has no digests to compare with, since an earlier release built it; build it anew with "
            "'calibadv index', which makes them"
        )
    check_sizes(folder, manifest.files, _REMEDY)
    verify_digests(folder / MANIFEST, manifest.digests, _REMEDY)
    return open_index(folder)[0]  # which compares the manifest with what it describes


def _find_manifest(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"index '{folder}' is not a folder; give a folder that 'calibadv index' wrote")
    if (folder / MANIFEST).exists():
        return folder / MANIFEST
    if (folder / UNFINISHED).exists():
        raise UserError(f"index '{folder}' is unfinished; run the same 'calibadv index' command again to go on")
    raise UserError(
        f"'{folder}' is a folder without {MANIFEST}, and so not an index; give a folder that 'calibadv index' wrote"
    )
