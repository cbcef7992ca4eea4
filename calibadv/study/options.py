"""The options of a study that are not options of ``fit``."""

from __future__ import annotations

import json
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from calibadv.config.arms import check_not_per_run
from calibadv.config.errors import explain
from calibadv.config.files import ConfigFile, Option
from calibadv.errors import UserError

_MAX_SEED = 2**32 - 1  # of NumPy, which LightningCLI seeds too
# Options that may be given several times or with several values, and their metavars in --help.
LIST_OPTIONS = {"arm": "NAME[=OVERLAY[+OVERLAY...]]", "seeds": "N ..."}


@dataclass
class StudyOptions:
    """Arms and seeds of a study, and the number of parallel runs."""

    out: str
    """Folder of the study: runs in OUT/ARM/seedK, the report in OUT/report. A second call with it continues."""
    arm: list[str]
    """NAME for the configs as they are, or NAME=OVERLAY[+OVERLAY...], packaged configs or files. Once for each arm."""
    seeds: list[int]
    """Seeds; every arm is trained with each of them."""
    jobs: int | None = None
    """Runs at a time; by default the number of CPU cores by that of threads, and 1 where runs use an accelerator."""
    threads: int = 1
    """CPU threads of each run. Rounding may depend on it, so a study keeps to one number."""
    baseline: str | None = None
    """The arm that the report compares the others with; by default grpo, or else the first."""

    def __post_init__(self) -> None:
        for name, value in (("jobs", self.jobs), ("threads", self.threads)):
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; it must be at least 1")
        if not self.seeds:
            raise UserError("--seeds names no seed; give at least one, such as --seeds 0 1 2")
        for seed in self.seeds:
            if not 0 <= seed <= _MAX_SEED:
                raise UserError(f"--seeds has {seed}; a seed is a whole number from 0 to {_MAX_SEED}")
            if self.seeds.count(seed) > 1:
                raise UserError(f"--seeds has {seed} twice; give each seed once")

    @property
    def folder(self) -> Path:
        """``out`` as a path."""
        return Path(self.out)


def split_options(settings: Sequence[ConfigFile | Option]) -> tuple[list[Option], list[ConfigFile | Option]]:
    """Separate the options of a study from the settings of ``fit``."""
    names = {f"--{field.name}" for field in fields(StudyOptions)}
    own: list[Option] = []
    others: list[ConfigFile | Option] = []
    for setting in settings:
        if isinstance(setting, Option) and setting.name in names:
            own.append(setting)
            continue
        if isinstance(setting, Option):
            check_not_per_run(setting.name.lstrip("-"), setting.name)
        others.append(setting)
    return own, others


def read_options(own: Sequence[Option]) -> StudyOptions:
    """Parse the options of a study."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(StudyOptions)
    try:
        parsed = parser.parse_args(_with_joined_lists(own))
    except ArgumentError as error:
        options = [option for action in parser._actions for option in action.option_strings]
        raise UserError(explain(str(error), options)) from error
    return StudyOptions(**parsed.as_dict())


def _with_joined_lists(own: Sequence[Option]) -> list[str]:
    """The command line, where an option that is given several times stands once with all of its values."""
    words: list[str] = []
    lists: dict[str, list[Any]] = {}
    for option in own:
        if option.name.lstrip("-") not in LIST_OPTIONS:
            words += option.words
            continue
        _, equals, value = option.words[0].partition("=")
        given = [value] if equals else list(option.words[1:])
        lists.setdefault(option.name, []).extend(_values(given, option.name))
    return words + [word for name, values in lists.items() for word in (name, json.dumps(values))]


def _values(given: list[str], name: str) -> list[Any]:
    if not given:
        raise UserError(f"{name} has no value; give it one")
    if name == "--arm":
        return given
    return [int(word) if word.lstrip("-").isdecimal() else word for word in given]
