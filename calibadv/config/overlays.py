"""Checks of the order of overlays."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from calibadv.config.files import CALLBACKS, ConfigFile, Option
from calibadv.errors import UserError


def scan_settings(settings: Sequence[ConfigFile | Option]) -> None:
    """Refuse what the parser would accept without doing what is meant."""
    for place, setting in enumerate(settings):
        _refuse_if_lost(setting, [later for later in settings[place + 1 :] if isinstance(later, ConfigFile)])
    names = [name for name, _ in calibrations(settings)]
    if len(names) > 1:
        raise UserError(
            f"{' and '.join(repr(name) for name in names)} each install an AdvantageCalibration; give one overlay that "
            "lists all calibrators in one such callback, as calibrators/calibadv does"
        )


def _refuse_if_lost(setting: ConfigFile | Option, later: Sequence[ConfigFile]) -> None:
    owners = {key: _set_again_by(key, later) for key in setting.values}
    last = next((other.name for other in reversed(later) if other.name in owners.values()), None)
    if last is None:
        return
    if all(owners.values()):
        raise UserError(
            f"nothing of '{setting.name}' remains: what comes later sets all of it again; leave it out, "
            f"or put it after '{last}'"
        )
    for key, owner in owners.items():
        if key.endswith("+") and owner:
            raise UserError(
                f"what '{setting.name}' appends to {key[:-1]} is lost: '{owner}' sets the whole list afterwards; "
                f"put '{setting.name}' after '{owner}'"
            )


def _set_again_by(key: str, later: Sequence[ConfigFile]) -> str | None:
    """The last file that sets the key, or what contains it, or puts a class without such an option in its place."""
    parts = key.removesuffix("+").split(".")
    for config in reversed(later):
        for end in range(1, len(parts) + 1):
            if ".".join(parts[:end]) in config.values or _drops(parts[:end], parts[end:], config):
                return config.name
    return None


def _drops(owner: list[str], rest: list[str], config: ConfigFile) -> bool:
    """Whether a file sets a class for ``owner`` that does not take the option ``rest``."""
    new = config.values.get(".".join([*owner, "class_path"]))
    option = rest[rest[:1] == ["init_args"] :]
    if not isinstance(new, str) or not option:
        return False
    try:
        accepted = options_of(new)
    except (ImportError, AttributeError, ValueError):
        return False  # the parser will say what it thinks of that class
    return option[0] not in accepted and all(entry.kind is not entry.VAR_KEYWORD for entry in accepted.values())


def options_of(class_path: str) -> Mapping[str, inspect.Parameter]:
    """What a class is made with."""
    module, _, name = class_path.rpartition(".")
    return inspect.signature(getattr(import_module(module), name)).parameters


def calibrations(configs: Sequence[ConfigFile | Option]) -> list[tuple[str, Any]]:
    """The AdvantageCalibration callbacks that are in effect after all files and options."""
    found: list[tuple[str, Any]] = []
    for config in configs:
        if CALLBACKS in config.values:
            found = []
        for key in (CALLBACKS, f"{CALLBACKS}+"):
            entries = config.values.get(key) or []
            found += [(config.name, entry) for entry in _as_list(entries) if is_calibration(entry)]
    return found


def _as_list(entries: Any) -> list[Any]:
    return entries if isinstance(entries, list) else [entries]


def is_calibration(entry: Any) -> bool:
    """Whether an entry of ``trainer.callbacks`` is an AdvantageCalibration."""
    name = entry.get("class_path") if hasattr(entry, "get") else entry
    return isinstance(name, str) and name.rpartition(".")[2] == "AdvantageCalibration"
