"""Reading of config files, and of a command line as config files and options."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from calibadv.errors import UserError

CALLBACKS = "trainer.callbacks"
_OPTION = re.compile(r"--?[A-Za-z]")  # not a number such as -1


def configs_folder() -> Path:
    """Return the folder of the packaged configs."""
    package = Path(str(files("calibadv")))
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def resolve_config(name: str) -> Path:
    """Return the path of a packaged config or of a file."""
    folder = configs_folder()
    for candidate in (folder / f"{name}.yaml", Path(name)):
        if candidate.is_file():
            return candidate
    names = sorted(config_name(path) for path in folder.rglob("*.yaml"))
    close = _close_to(name, names)
    known = f"did you mean {' or '.join(close)}?" if close else f"the packaged ones are {', '.join(names)}"
    raise UserError(f"config '{name}' is neither a file nor a packaged config; {known}")


def _close_to(name: str, names: Sequence[str]) -> list[str]:
    """Return the names that begin like a name, or else those whose last part is like its last part."""
    last_parts = {known.rpartition("/")[2] for known in names}
    meant = difflib.get_close_matches(Path(name).stem, last_parts, n=1, cutoff=0.8)
    begins = [known for known in names if known.startswith(name)]
    return begins or [known for known in names if known.rpartition("/")[2] in meant]


def config_name(path: Path) -> str:
    """Return the name of a packaged config, or the path of another file."""
    folder = configs_folder().resolve()
    if path.resolve().is_relative_to(folder):
        return path.resolve().relative_to(folder).with_suffix("").as_posix()
    return str(path)


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A config file; ``values`` maps dotted keys such as ``trainer.callbacks+`` to their values."""

    name: str
    path: Path
    values: dict[str, Any]

    @property
    def words(self) -> tuple[str, ...]:
        """Words that name the file on a command line."""
        return ("--config", self.name)


def read_words(arguments: Sequence[str]) -> list[ConfigFile | Option]:
    """Read the words of a command line: config files and options, in their order."""
    settings: list[ConfigFile | Option] = []
    for words in _options(arguments):
        name, equals, value = words[0].partition("=")
        given = [value] if equals else words[1:]
        if name in ("--config", "-c"):
            if not any(given):
                raise UserError("--config has no value; name a packaged config such as quickstart, or a file")
            settings += [read_config(resolve_config(config)) for config in given]
        else:
            settings.append(Option(name, tuple(words), {name.lstrip("-"): _parse(given)}))
    return settings


def _options(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Yield each option with the words up to the next one."""
    starts = [index for index, word in enumerate(arguments) if _OPTION.match(word)]
    for start, end in zip([0, *starts], [*starts, len(arguments)], strict=True):
        if arguments[start:end]:
            yield list(arguments[start:end])


def _parse(given: list[str]) -> Any:
    try:
        return yaml.safe_load(" ".join(given))
    except yaml.YAMLError:
        return None  # not the name of a callback; the parser reports it


def read_config(path: Path) -> ConfigFile:
    """Read a config file."""
    return ConfigFile(config_name(path), path, dict(_flatten(read_yaml(path), "")))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config '{config_name(path)}' is not YAML: {reason}") from error
    if not isinstance(content, dict | None):
        raise UserError(f"config '{config_name(path)}' holds {type(content).__name__}; write 'key: value' lines")
    return content or {}


def _flatten(mapping: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a command line; ``words`` are as typed, ``values`` is as in ``ConfigFile``."""

    name: str
    words: tuple[str, ...]
    values: dict[str, Any]
