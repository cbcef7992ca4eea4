"""What the results of a study depend on beside its settings: the code, and the files that the settings name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

import calibadv
from calibadv.runs.settings import flatten
from calibadv.study.arms import Settings

_PARTS = ("data.", "model.")  # other sections name places to write to
_OURS = "calibadv"
_INSTALLED = (_OURS, "lightning", "torch")  # the record holds their versions, and the code of the first
# Of a larger file, such as the weights of a model, only the size and both ends are read.
_WHOLE = 64 << 20
_END = 1 << 20
# Caches, and what editors and file managers leave.
_NO_MATTER = re.compile(r"__pycache__|(^|/)\.|~$")


def digests(arms: Iterable[Settings]) -> dict[str, str]:
    """Sum up the contents of everything that results depend on and that can change under an unchanged name."""
    # Reports are written of finished runs, so the code that writes them may change.
    found = {_OURS: _digest(Path(calibadv.__file__).parent, without="analysis/")}
    for settings in arms:
        for key, text in flatten(settings).items():
            if isinstance(text, str) and text not in found:
                path = _module(text) if key.endswith("class_path") else _named(key, text)
                if path is not None and path.exists():
                    found[text] = _digest(path)
    return found


def _module(class_path: str) -> Path | None:
    """The file of a class, None for those whose version is recorded."""
    name = class_path.rpartition(".")[0]
    if name.partition(".")[0] in _INSTALLED:
        return None
    spec = find_spec(name)
    return Path(spec.origin) if spec and spec.origin else None


def _named(key: str, text: str) -> Path | None:
    """The path that a setting may name. A plain word is a choice, such as ``constant``; a policy may be called so."""
    looks_like_one = key == "model.policy" or "/" in text or "." in text
    return Path(text) if looks_like_one and key.startswith(_PARTS) else None


def _digest(path: Path, without: str | None = None) -> str:
    digest = blake2b(digest_size=8)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        if _NO_MATTER.search(name) or (without is not None and name.startswith(without)):
            continue
        size = file.stat().st_size
        digest.update(f"{name}/{size}/".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_WHOLE if size <= _WHOLE else _END))
            if size > _WHOLE:
                stream.seek(-_END, 2)
                digest.update(stream.read())
    return digest.hexdigest()
