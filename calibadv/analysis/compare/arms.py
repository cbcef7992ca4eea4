"""Arms: the runs of a comparison that differ in nothing but the seed."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from calibadv.analysis.compare.runs import Run
from calibadv.errors import UserError
from calibadv.runs.settings import as_text

# What fit puts at the end of a run's name: calibadv.config.trainer_checks.run_timestamp.
_MOMENT = re.compile(r"(?<=\d)-(?:\d{8}-\d{6}|job[^-]+)$")
_SHORT_VALUE = 40
_SEED_FOLDER = re.compile(r"(?:seed)?[-_=.]?\d+")
_SEED_SUFFIX = re.compile(r"[-_=.]?(?:seed)?[-_=.]?(\d+)$")


@dataclass(frozen=True, slots=True)
class Arm:
    """One method in its setting, with a run per seed."""

    name: str  # unique, and that of its folder in a study
    runs: tuple[Run, ...]  # in the order of their seeds

    @property
    def is_calibadv_run(self) -> bool:
        """True if calibadv made the runs, and not another program."""
        return self.runs[0].is_calibadv_run

    @property
    def finished(self) -> list[Run]:
        """The runs that have results: trained to the end, with validations."""
        return [run for run in self.runs if run.finished]


def group_arms(runs: Sequence[Run]) -> list[Arm]:
    """Group runs that differ in nothing but the seed.

    The name of an arm is that of the folder that holds ``seed0``, ``seed1``, ..., as in a study; else the name of its
    runs without the seed; else that of a folder that holds its runs and no others. If that is not one name, or several
    arms have it, the settings that differ are added, or the path of the first run is taken.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(run), []).append(run)
    members = list(groups.values())
    arms = [Arm(name, tuple(sorted(group, key=_by_seed))) for name, group in zip(_names(members), members, strict=True)]
    for arm in arms:
        _check_seeds(arm)
    return arms


def _key(run: Run) -> str:
    if run.settings is None:
        return str(run.path.parent / _SEED_SUFFIX.sub("", run.path.name))
    return json.dumps(run.settings, sort_keys=True, default=str)


def _by_seed(run: Run) -> tuple[bool, int, str]:
    return (run.seed is None, run.seed or 0, run.label)


def _check_seeds(arm: Arm) -> None:
    for before, run in zip(arm.runs, arm.runs[1:], strict=False):
        if run.seed is not None and before.seed == run.seed:
            raise UserError(
                f"runs '{before.path}' and '{run.path}' have the same settings and the same seed {run.seed}; "
                "leave one of them out"
            )


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    bases = [_base_name(group) for group in groups]
    names = [""] * len(groups)
    for proposed in (bases, _own_folders(groups)):
        unique = [name if proposed.count(name) == 1 and name not in names else "" for name in proposed]
        names = [name or other for name, other in zip(names, unique, strict=True)]
    _name_by_settings(names, bases, groups)
    counts = Counter(names)
    return [name if counts[name] == 1 else group[0].label for name, group in zip(names, groups, strict=True)]


def _name_by_settings(names: list[str], bases: Sequence[str], groups: Sequence[Sequence[Run]]) -> None:
    """Name the arms that have no name yet by their base name and the settings in which they differ."""
    same_base: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        if not name:
            same_base[bases[index]].append(index)
    for base, indexes in same_base.items():
        for index, given in zip(indexes, _settings_names([groups[index][0] for index in indexes]), strict=True):
            names[index] = ", ".join(filter(None, [base, given]))


def _like_seeds(group: Sequence[Run]) -> bool:
    """True for run folders as in a study: seed0, seed1, ..."""
    return all(_SEED_FOLDER.fullmatch(run.path.name) for run in group)


def _base_name(group: Sequence[Run]) -> str:
    """``grpo`` for grpo/seed0 and grpo/seed1; else the runs' names without the seed, if they agree."""
    folders = {run.path.parent.name for run in group}
    if len(folders) == 1 and _like_seeds(group):
        return folders.pop()
    names = {_without_seed(run) for run in group}
    return names.pop() if len(names) == 1 else ""


def _without_seed(run: Run) -> str:
    """``quickstart`` for the name that ``fit`` gives a run; whole where the number at its end is not the seed."""
    name = _MOMENT.sub("", run.path.name) if run.is_calibadv_run else run.path.name
    ending = _SEED_SUFFIX.search(name)
    is_seed = ending is not None and (not run.is_calibadv_run or int(ending[1]) == run.seed)
    return _SEED_SUFFIX.sub("", name) if is_seed else name


def _own_folders(groups: Sequence[Sequence[Run]]) -> list[str]:
    """``grpo`` for grpo/monday and grpo/tuesday, if that folder holds no other arm's runs; else empty."""
    folders = [{run.path.parent for run in group} for group in groups]
    owners = Counter(folder for parents in folders for folder in parents)
    return [
        next(iter(parents)).name if [owners[folder] for folder in parents] == [1] and not _like_seeds(group) else ""
        for group, parents in zip(groups, folders, strict=True)
    ]


def _settings_names(runs: Sequence[Run]) -> list[str]:
    """``learning_rate=0.0006`` and the like: of the settings that differ, as many as tell all runs apart."""
    settings = [(key.rpartition(".")[2], texts) for key, texts in differing_settings(runs).items()]
    names: list[str] = [""] * len(runs)
    for longest, count in product((_SHORT_VALUE, None), range(1, len(settings) + 1)):
        chosen = settings[:count]
        names = [_joined([(key, texts[index]) for key, texts in chosen], longest) for index in range(len(runs))]
        if len(set(names)) == len(names):
            break
    return names


def _joined(settings: Sequence[tuple[str, str]], longest: int | None) -> str:
    shown = [
        (key, text if longest is None or len(text) <= longest else f"{text[:longest]}...") for key, text in settings
    ]
    return ", ".join(f"{key}={text}" for key, text in shown if text)


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings that differ between runs, one text per run."""
    return {key: texts for key, texts in _settings(runs).items() if len(_values(texts, runs)) > 1}


def shared_settings(runs: Sequence[Run]) -> dict[str, str]:
    """The settings that all runs share."""
    values = {key: _values(texts, runs) for key, texts in _settings(runs).items()}
    return {key: found.pop() for key, found in values.items() if len(found) == 1}


def _settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    keys = dict.fromkeys(key for run in runs for key in run.settings or ())
    return {key: [_value(run.settings or {}, key) for run in runs] for key in keys}


def _values(texts: Sequence[str], runs: Sequence[Run]) -> set[str]:
    return {text for text, run in zip(texts, runs, strict=True) if run.is_calibadv_run}


def _value(settings: Mapping[str, Any], key: str) -> str:
    return as_text(settings[key]) if key in settings else ""
