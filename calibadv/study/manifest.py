"""The manifest of a study, study.json: it makes a second call continue this study and no other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calibadv.errors import UserError
from calibadv.io.files import write_atomically
from calibadv.runs.folder import STUDY_FILE
from calibadv.runs.settings import flatten, method_settings
from calibadv.runs.versions import versions
from calibadv.study.arms import Settings
from calibadv.study.fingerprints import PACKAGE, source_fingerprints

_MAX_SHOWN = 3


@dataclass(frozen=True, slots=True)
class StudyManifest:
    """Everything that the results of a study depend on."""

    arms: dict[str, Settings]  # the whole config of each, by name
    seeds: list[int]  # every arm is trained with each
    threads: int  # CPU threads of each run
    versions: dict[str, str]  # of Python and of the packages
    sources: dict[str, str]  # digests of the code and of the files that the settings name

    @classmethod
    def read(cls, out: Path) -> StudyManifest | None:
        """Read the manifest of a folder; None if it has none."""
        path = out / STUDY_FILE
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"'{path}' is not the manifest of a study ({error}); choose another --out") from error

    def write(self, out: Path) -> None:
        """Write the manifest into a folder, whole or not at all."""
        write_atomically(out / STUDY_FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    def extended(self, given: StudyManifest, out: Path) -> StudyManifest:
        """Return the manifest with the arms and seeds of another call added."""
        differences = [*self._differences(given), *_arm_differences(self.arms, given.arms)]
        if differences:
            shown = "; ".join(differences[:_MAX_SHOWN])
            more = f"; and {len(differences) - _MAX_SHOWN} more" if len(differences) > _MAX_SHOWN else ""
            raise UserError(
                f"the study in {out} was begun with other settings: {shown}{more}; give the same ones, or another --out"
            )
        return replace(
            self,
            arms={**self.arms, **given.arms},
            seeds=list(dict.fromkeys([*self.seeds, *given.seeds])),
            sources={**self.sources, **given.sources},
        )

    def check_arms(self) -> None:
        """Check that the arms differ in something that a run depends on: only then can a report tell them apart."""
        methods: dict[str, dict[str, Any]] = {}
        for name, settings in self.arms.items():
            method = method_settings(settings)
            same = next((other for other, known in methods.items() if known == method), None)
            if same is not None:
                raise UserError(f"arms '{same}' and '{name}' have the same settings; leave one of them out")
            methods[name] = method

    def check_unchanged(self) -> None:
        """Check that versions, code and files are those that the study began with."""
        now = source_fingerprints(self.arms.values())
        changed = [*_changed(self.versions, versions()), *_changed_sources(self.sources, now)]
        if changed:
            raise UserError(f"{'; '.join(changed)}: put it back as it was, or begin with another --out")

    def _differences(self, given: StudyManifest) -> Iterator[str]:
        if given.threads != self.threads:
            yield f"--threads {self.threads} (now {given.threads})"
        yield from _changed(self.versions, given.versions)
        yield from _changed_sources(self.sources, given.sources)


def _arm_differences(before: Mapping[str, Settings], now: Mapping[str, Settings]) -> Iterator[str]:
    """First the differences common to all arms that both have, then those of single arms."""
    changes = {name: list(_changed(flatten(before[name]), flatten(now[name]))) for name in before if name in now}
    common = [text for text in next(iter(changes.values()), []) if all(text in other for other in changes.values())]
    yield from common
    for name, texts in changes.items():
        yield from (f"arm '{name}': {text}" for text in texts if text not in common)


def _changed_sources(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name, digest in before.items():
        if now.get(name, digest) != digest:
            yield f"{'the code of ' if name == PACKAGE else ''}{name} has changed since the study began"


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *now]):
        old, new = (json.dumps(values[key]) if key in values else "not set" for values in (before, now))
        if old != new:
            yield f"{key} {old} (now {new})"
