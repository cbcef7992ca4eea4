"""Arms: the runs of a comparison that differ in nothing but the seed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibadv.reports.runs import Run
from calibadv.settings import as_text

# What fit puts at the end of a run's name: calibadv.cli.trainer.moment.
_MOMENT = re.compile(r"(?<=\d)-(?:\d{8}-\d{6}|job[^-]+)$")
_LONGEST_VALUE = 40
_SEED_FOLDER = re.compile(r"(?:seed)?[-_=.]?\d+")
_SEED_SUFFIX = re.compile(r"[-_=.]?(?:seed)?[-_=.]?(\d+)$")


@dataclass(frozen=True, slots=True)
class Arm:
    """One method in its setting, with a run per seed.

    Attributes:
        name: unique in the comparison.
        runs: in the order of their seeds.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def ours(self) -> bool:
        """Whether this program made the runs."""
        return self.runs[0].ours

    @property
    def finished(self) -> list[Run]:
        """The runs that have figures: trained to the end, with validations."""
        return [run for run in self.runs if run.finished]

    @property
    def unfinished(self) -> list[Run]:
        """The other ones."""
        return [run for run in self.runs if not run.finished]


def group_arms(runs: Sequence[Run]) -> list[Arm]:
    """Put runs together that differ in nothing but the seed.

    An arm is called as a study calls it, by the folder that holds ``seed0``, ``seed1``, ...; else by what is left of
    its runs' names without the seed; else as its only run; else by a folder that holds its runs and no others; else by
    the path of its only run; else by what differs. Where arms of several studies have one name, what differs between
    them stands behind it.

    Args:
        runs: at least one. Those of other programs belong together where their folders' names differ in a number at
            the end only.

    Returns:
        Arms in the order of their first runs.

    Raises:
        ValueError: two runs of an arm have one seed, or two arms would have one name.
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
            raise ValueError(
                f"runs '{before.path}' and '{run.path}' have the same settings and the same seed {run.seed}; "
                "leave one of them out"
            )


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    owners = Counter(parent for group in groups for parent in {run.path.parent for run in group})
    names = [""] * len(groups)
    for rule in (_study_name, _name_without_seed, _run_name, lambda group: _own_folder(group, owners), _run_path):
        proposed = [rule(group) for group in groups]
        unique = [name if proposed.count(name) == 1 and name not in names else "" for name in proposed]
        names = [name or other for name, other in zip(names, unique, strict=True)]
    folders = [_study_name(group) for group in groups]
    for place, group in enumerate(groups):
        if not names[place]:
            alike = [other for other, folder in enumerate(folders) if folder == folders[place]]
            given = _settings_names([groups[other][0] for other in alike])[alike.index(place)]
            names[place] = ", ".join(filter(None, [folders[place], given])) or group[0].path.name
    for name, count in Counter(names).items():
        if count > 1:
            first, second, *_ = (group[0].path for group, other in zip(groups, names, strict=True) if other == name)
            raise ValueError(f"the arms of '{first}' and '{second}' would both be called '{name}'; rename a folder")
    return names


def _study_name(group: Sequence[Run]) -> str:
    """``grpo`` for grpo/seed0 and grpo/seed1, also where they lie in two studies."""
    folders = {run.path.parent.name for run in group}
    like_seeds = all(_SEED_FOLDER.fullmatch(run.path.name) for run in group)
    return folders.pop() if len(folders) == 1 and like_seeds else ""


def _name_without_seed(group: Sequence[Run]) -> str:
    """``grpo-6e-4`` for grpo-6e-4-0 and grpo-6e-4-1, ``quickstart`` for the name that ``fit`` gives a run."""
    names = [_MOMENT.sub("", run.path.name) if run.ours else run.path.name for run in group]
    found = {_SEED_SUFFIX.sub("", name) for name in names}
    endings = [_SEED_SUFFIX.search(name) for name in names]
    by_seed = all(end and int(end[1]) == run.seed for end, run in zip(endings, group, strict=True))
    alike = by_seed or not group[0].ours
    return found.pop() if len(found) == 1 and alike else ""


def _run_name(group: Sequence[Run]) -> str:
    """``first`` for a single run of that name."""
    return group[0].path.name if len(group) == 1 else ""


def _own_folder(group: Sequence[Run], owners: Mapping[Path, int]) -> str:
    """``grpo`` for grpo/monday and grpo/tuesday, where that folder holds no other arm's runs."""
    folders = {run.path.parent for run in group}
    return folders.pop().name if len(folders) == 1 and owners[group[0].path.parent] == 1 else ""


def _run_path(group: Sequence[Run]) -> str:
    """``b/run`` for a single run, where neither part of it is enough."""
    return group[0].label if len(group) == 1 else ""


def _settings_names(runs: Sequence[Run]) -> list[str]:
    """``learning_rate=0.0006`` and the like: of the settings that differ, as many as tell all runs apart."""
    settings = [(key.rpartition(".")[2], texts) for key, texts in differing_settings(runs).items()]
    names = [""] * len(runs)
    for count in range(1, len(settings) + 1):
        names = [
            ", ".join(f"{key}={_shortened(texts[place])}" for key, texts in settings[:count] if texts[place])
            for place in range(len(runs))
        ]
        if len(set(names)) == len(names):
            break
    return names


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Compare the configs of runs.

    Args:
        runs: one per arm.

    Returns:
        For each setting that is not the same in all of our runs, its value in each run: empty where it has none, as in
        every run of another program.
    """
    return {key: texts for key, texts in _settings(runs).items() if len(_values(texts, runs)) > 1}


def shared_settings(runs: Sequence[Run]) -> dict[str, str]:
    """The rest of what ``differing_settings`` compares.

    Args:
        runs: one per arm.

    Returns:
        For each setting that is the same in all of our runs, its value.
    """
    values = {key: _values(texts, runs) for key, texts in _settings(runs).items()}
    return {key: found.pop() for key, found in values.items() if len(found) == 1}


def _settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    keys = dict.fromkeys(key for run in runs for key in run.settings or ())
    return {key: [_value(run.settings or {}, key) for run in runs] for key in keys}


def _values(texts: Sequence[str], runs: Sequence[Run]) -> set[str]:
    return {text for text, run in zip(texts, runs, strict=True) if run.ours}


def _value(settings: Mapping[str, Any], key: str) -> str:
    return as_text(settings[key]) if key in settings else ""
