"""Fingerprints of what the results of a study depend on beside its settings: the code, and files named by settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

import calibadv
from calibadv.runs.settings import flatten
from calibadv.study.arms import Settings

PACKAGE = "calibadv"
_INPUT_SECTIONS = ("data.", "model.")  # other sections name places to write to
_VERSIONED_PACKAGES = (PACKAGE, "lightning", "torch")  # the manifest holds their versions, and the code of the first
# Of a larger file, such as the weights of a model, only the size and both ends are read.
_FULL_HASH_BYTES = 64 << 20
_END_BYTES = 1 << 20
# Caches, and what editors and file managers leave.
_IGNORED_FILES = re.compile(r"__pycache__|(^|/)\.|~$")


def source_fingerprints(arms: Iterable[Settings]) -> dict[str, str]:
    """Return digests of all code and files that results depend on and that can change under an unchanged name."""
    # Reports are written of finished runs, so the code that writes them may change.
    found = {PACKAGE: _digest(Path(calibadv.__file__).parent, without="analysis/")}
    for settings in arms:
        for key, text in flatten(settings).items():
            if isinstance(text, str) and text not in found:
                path = _module_file(text) if key.endswith("class_path") else _input_path(key, text)
                if path is not None and path.exists():
                    found[text] = _digest(path)
    return found


def _module_file(class_path: str) -> Path | None:
    """The file of a class; None for those whose version is recorded."""
    name = class_path.rpartition(".")[0]
    if name.partition(".")[0] in _VERSIONED_PACKAGES:
        return None
    spec = find_spec(name)
    return Path(spec.origin) if spec and spec.origin else None


def _input_path(key: str, text: str) -> Path | None:
    """The path that a setting may name. A plain word is a choice, such as ``constant``; a policy may be called so."""
    looks_like_path = key == "model.policy" or "/" in text or "." in text
    return Path(text) if looks_like_path and key.startswith(_INPUT_SECTIONS) else None


def _digest(path: Path, without: str | None = None) -> str:
    digest = blake2b(digest_size=8)
    for name, file in _hashed_files(path, without):
        size = file.stat().st_size
        digest.update(f"{name}/{size}/".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_FULL_HASH_BYTES if size <= _FULL_HASH_BYTES else _END_BYTES))
            if size > _FULL_HASH_BYTES:
                stream.seek(-_END_BYTES, 2)
                digest.update(stream.read())
    return digest.hexdigest()


def _hashed_files(path: Path, without: str | None) -> Iterator[tuple[str, Path]]:
    """Names below ``path`` and files, in one order everywhere; a file itself has no name."""
    if not path.is_dir():
        yield "", path
        return
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        name = file.relative_to(path).as_posix()
        if not (_IGNORED_FILES.search(name) or (without is not None and name.startswith(without))):
            yield name, file
