"""One run of a study: where it lies, how far it is, and what to type to run it or to continue it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from calibadv.io.files import write_atomically
from calibadv.runs.folder import RunFolder, step_of
from calibadv.study.arms import Settings
from calibadv.study.manifest import Record


@dataclass(frozen=True, slots=True)
class StudyRun:
    """One arm with one seed.

    Attributes:
        out: folder of the study.
        arm: name of the arm.
        seed: of the run.
        steps: rollout steps that it is to have in the end.
    """

    out: Path
    arm: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.arm}/seed{self.seed}"

    @property
    def folder(self) -> RunFolder:
        """Where it lies."""
        return RunFolder(self.out / self.arm / f"seed{self.seed}")

    @property
    def log(self) -> Path:
        """What it prints, of all its parts."""
        return self.folder.path.with_suffix(".log")

    @property
    def lock(self) -> Path:
        """Held by the process that trains it."""
        return self.folder.path.with_name(f".seed{self.seed}.lock")

    @property
    def config(self) -> Path:
        """The whole config of its arm."""
        return config_of_arm(self.out, self.arm)

    @property
    def _mark(self) -> Path:
        return self.folder.path / "finished"

    @property
    def finished(self) -> bool:
        """Whether it has come to its end, with everything written."""
        return self._mark.exists()

    def mark_finished(self) -> None:
        """Note that it has come to its end."""
        self._mark.touch()

    def progress(self) -> tuple[int, float | None]:
        """Look how far it is, at little cost."""
        results = self.folder.read_results()
        files = [*self.folder.rollouts.glob("train-step-*.jsonl"), *self.folder.step_checkpoints()]
        rows = [row for row in results.get("validations", ()) if "f1" in row]
        last = rows[-1]["f1"] if rows else None
        step = max([results.get("rollout_step", 0), *map(step_of, files)])
        return step, results.get("final_f1") if self.finished else last

    @property
    def words(self) -> list[str]:
        """What starts, continues or finishes it, behind ``calibadv``."""
        words = ["fit", "--config", str(self.config), "--seed_everything", str(self.seed)]
        words += ["--run.root", str(self.folder.path.parent), "--run.name", self.folder.path.name]
        return [*words, "--ckpt_path", "auto"]

    def last_line(self) -> str:
        """Give the end of what it has printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it has printed nothing")


def config_of_arm(out: Path, arm: str) -> Path:
    """Where the whole config of an arm lies, which its runs read."""
    return out / arm / "arm.yaml"


def write_config(out: Path, arm: str, settings: Settings) -> None:
    """Write the config of an arm."""
    write_atomically(config_of_arm(out, arm), yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def runs_of(record: Record, out: Path) -> Iterator[StudyRun]:
    """List the runs of a study in the order in which they start."""
    for seed in record.seeds:
        for arm, settings in record.arms.items():
            yield StudyRun(out, arm, seed, int(settings["model"]["rollout_steps"]))
