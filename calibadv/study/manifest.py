"""study.json: what a study is made of, so that a second call continues this one and no other."""

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
from calibadv.study.fingerprints import digests

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Record:
    """What decides the results of a study.

    Attributes:
        arms: the whole config of each, by name.
        seeds: every arm is trained with each.
        threads: CPU threads of each run.
        versions: of Python and of the packages.
        sources: digests of the code and of the files that the settings name, of ``calibadv.study.fingerprints``.
    """

    arms: dict[str, Settings]
    seeds: list[int]
    threads: int
    versions: dict[str, str]
    sources: dict[str, str]

    @classmethod
    def read(cls, out: Path) -> Record | None:
        """Read the record of a folder."""
        path = out / STUDY_FILE
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"'{path}' is not the record of a study ({error}); choose another --out") from error

    def write(self, out: Path) -> None:
        """Write the record into a folder, whole or not at all."""
        write_atomically(out / STUDY_FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    def extended(self, given: Record, out: Path) -> Record:
        """Add what another call names."""
        differences = list(self._differences(given))
        if differences:
            shown = "; ".join(differences[:_SHOWN])
            more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise UserError(
                f"the study in {out} was begun otherwise: {shown}{more}; give what it was begun with, or another --out"
            )
        seeds = dict.fromkeys([*self.seeds, *given.seeds])
        return replace(
            self,
            arms={**self.arms, **given.arms},
            seeds=list(seeds),
            sources={**self.sources, **given.sources},
        )

    def check_arms(self) -> None:
        """See that the arms differ in something that a run depends on: only then can a report tell them apart."""
        methods: dict[str, dict[str, Any]] = {}
        for name, settings in self.arms.items():
            method = method_settings(settings)
            same = next((other for other, known in methods.items() if known == method), None)
            if same is not None:
                raise UserError(f"arms '{same}' and '{name}' have the same settings; leave one of them out")
            methods[name] = method

    def check_unchanged(self) -> None:
        """See that what the record names is what it was."""
        now = digests(self.arms.values())
        changed = [*_changed(self.versions, versions()), *_changed_sources(self.sources, now)]
        if changed:
            raise UserError(f"{'; '.join(changed)}: put it back as it was, or begin with another --out")

    def _differences(self, given: Record) -> Iterator[str]:
        if given.threads != self.threads:
            yield f"--threads {self.threads} (now {given.threads})"
        yield from _changed(self.versions, given.versions)
        yield from _changed_sources(self.sources, given.sources)
        known = {name: arm for name, arm in self.arms.items() if name in given.arms}
        changes = {name: list(_changed(flatten(arm), flatten(given.arms[name]))) for name, arm in known.items()}
        common = [text for text in next(iter(changes.values()), []) if all(text in other for other in changes.values())]
        yield from common
        for name, texts in changes.items():
            yield from (f"arm '{name}': {text}" for text in texts if text not in common)


def _changed_sources(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name, digest in before.items():
        if now.get(name, digest) != digest:
            yield f"{'the code of ' if name == 'calibadv' else ''}{name} has changed since the study began"


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *now]):
        old, new = (json.dumps(values[key]) if key in values else "not set" for values in (before, now))
        if old != new:
            yield f"{key} {old} (now {new})"
