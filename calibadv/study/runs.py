"""A run of a study: its paths, its progress and its command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from subprocess import Popen

import yaml

from calibadv.io.files import write_atomically
from calibadv.runs.folder import RunFolder, step_of
from calibadv.study.arms import Settings
from calibadv.study.manifest import StudyManifest


@dataclass(frozen=True, slots=True)
class StudyRun:
    """One arm with one seed."""

    out: Path  # folder of the study
    arm: str
    seed: int
    steps: int  # rollout steps of the whole run

    @property
    def name(self) -> str:
        """The name of the run in messages."""
        return f"{self.arm}/seed{self.seed}"

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.out / self.arm / f"seed{self.seed}")

    @property
    def log(self) -> Path:
        """The file of all that the run prints, over all of its processes."""
        return self.folder.path.with_suffix(".log")

    @property
    def lock(self) -> Path:
        """The lock that is held by the process that trains it."""
        return self.folder.path.with_name(f".seed{self.seed}.lock")

    @property
    def _finished_marker(self) -> Path:
        return self.folder.path / "finished"

    @property
    def finished(self) -> bool:
        """True once the run has ended and all of its files are written."""
        return self._finished_marker.exists()

    def mark_finished(self) -> None:
        """Record that the run has ended."""
        self._finished_marker.touch()

    def progress(self) -> tuple[int, float | None]:
        """The rollout step reached, and the final F1, or of an unfinished run that of its last validation."""
        results = self.folder.read_results()
        files = [*self.folder.rollouts.glob("train-step-*.jsonl"), *self.folder.step_checkpoints()]
        rows = [row for row in results.get("validations", ()) if "f1" in row]
        last = rows[-1]["f1"] if rows else None
        step = max([results.get("rollout_step", 0), *map(step_of, files)])
        return step, results.get("final_f1") if self.finished else last

    @property
    def fit_arguments(self) -> list[str]:
        """The arguments of ``calibadv`` that start, continue or finish the run."""
        words = ["fit", "--config", str(arm_config_path(self.out, self.arm)), "--seed_everything", str(self.seed)]
        words += ["--run.root", str(self.folder.path.parent), "--run.name", self.folder.path.name]
        return [*words, "--ckpt_path", "auto"]

    def last_line(self) -> str:
        """The last line that the run has printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


@dataclass
class StudyState:
    """The runs of a study by status; failed ones with the reason."""

    waiting: list[StudyRun]
    finished: list[StudyRun]
    running: dict[StudyRun, Popen[bytes]] = field(default_factory=dict)
    failed: dict[StudyRun, str] = field(default_factory=dict)
    stopped_by: Signals | None = None


def arm_config_path(out: Path, arm: str) -> Path:
    """The file with the whole config of an arm, which its runs read."""
    return out / arm / "arm.yaml"


def write_arm_config(out: Path, arm: str, settings: Settings) -> None:
    """Write the config of an arm."""
    write_atomically(arm_config_path(out, arm), yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def study_runs(manifest: StudyManifest, out: Path) -> Iterator[StudyRun]:
    """The runs of a study in the order in which they start."""
    for seed in manifest.seeds:
        for arm, settings in manifest.arms.items():
            yield StudyRun(out, arm, seed, int(settings["model"]["rollout_steps"]))
