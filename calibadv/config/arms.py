"""Arms: methods to compare, each a name and the overlays that make it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from calibadv.config.files import ConfigFile, read_config, resolve_config
from calibadv.errors import UserError

REPORT = "report"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Options of fit that a study sets for each run, by the first part of their names.
PER_RUN_OPTIONS = {
    "run": "every run has the folder OUT/ARM/seedK; give --out",
    "seed_everything": "every arm is trained with each of --seeds",
    "ckpt_path": "unfinished runs continue from their last checkpoint by themselves, and all others start alike",
}


def check_not_per_run(key: str, shown: str) -> None:
    """Check that a setting is not one that a study sets for each run."""
    reason = PER_RUN_OPTIONS.get(key.partition(".")[0])
    if reason:
        raise UserError(f"{shown} is set by the study: {reason}")


@dataclass(frozen=True, slots=True)
class Arm:
    """One method of a study."""

    name: str  # unique, and that of its folder in a study
    overlays: tuple[ConfigFile, ...] = ()  # config files that come after those of all arms


def read_arms(words: Sequence[str]) -> list[Arm]:
    """Read the values of ``--arm``."""
    arms: list[Arm] = []
    for word in words:
        arm = _read_arm(word)
        if any(arm.name.lower() == other.name.lower() for other in arms):  # as file systems may take it
            raise UserError(f"duplicate arm '{arm.name}'; arm names must be unique")
        arms.append(arm)
    return arms


def _read_arm(word: str) -> Arm:
    name, equals, overlays = word.partition("=")
    if not _NAME.fullmatch(name):
        raise UserError(
            f"arm '{name}': a name has letters, digits, '_', '-' and '.', and begins with a letter or digit"
        )
    if name.lower() == REPORT:
        raise UserError(f"arm '{name}': the folder of this name is for the report; give another name")
    try:
        files = tuple(read_config(resolve_config(overlay)) for overlay in (overlays.split("+") if equals else ()))
        for file in files:
            for key in file.values:
                check_not_per_run(key, f"'{key}' of '{file.name}'")
    except ValueError as error:
        raise UserError(f"arm '{name}': {error}") from error
    return Arm(name, files)
