"""The run folder: where a run's config, curves, checkpoints, rollouts and results lie, and how it is resumed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STEP = re.compile(r"step[-=](\d+)")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run's folder; a method per thing that lies in it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of ``rollout-step=000060.ckpt`` and ``last.ckpt``."""
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        """Folder of ``train-step-000010.jsonl`` and the like."""
        return self.path / "rollouts"

    @property
    def results(self) -> Path:
        """File of the figures of every validation, and what they were made with."""
        return self.path / "results.json"

    def config(self, step: int) -> Path:
        """Where the resolved config is saved.

        Args:
            step: rollout steps done when the run was started.

        Returns:
            ``config.yaml``, or ``config-resume-<step>.yaml``.
        """
        return self.path / (f"config-resume-{step}.yaml" if step else "config.yaml")

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a rollout step is saved.

        Args:
            step: rollout steps done.

        Returns:
            A path under ``checkpoints``.
        """
        return self.checkpoints / f"rollout-step={step:06d}.ckpt"

    def rollout_file(self, split: str, step: int) -> Path:
        """Where rollouts are written.

        Args:
            split: ``train``, ``val``, ``test`` or ``predict``.
            step: rollout step.

        Returns:
            A path under ``rollouts``.
        """
        return self.rollouts / f"{split}-step-{step:06d}.jsonl"

    def newest_checkpoint(self) -> Path:
        """Find the checkpoint that was written last.

        Returns:
            ``last.ckpt``, or where that is missing the one of the highest step.

        Raises:
            ValueError: there is none.
        """
        last = self.checkpoints / "last.ckpt"
        found = [last] if last.exists() else sorted(self.checkpoints.glob("rollout-step=*.ckpt"))
        if not found:
            raise ValueError(
                f"--ckpt_path last: there is no checkpoint in {self.checkpoints}; start the run without --ckpt_path, "
                "or name the run to resume with --run.name"
            )
        return found[-1]

    def read_results(self) -> dict[str, Any]:
        """Read what earlier parts of this run recorded.

        Returns:
            The content of ``results.json``, or an empty dictionary.
        """
        content: dict[str, Any] = json.loads(self.results.read_text("utf-8")) if self.results.exists() else {}
        return content

    def drop_beyond(self, step: int) -> None:
        """Remove rollout files and checkpoints that a resumed run will write again.

        Args:
            step: rollout steps done at the checkpoint.
        """
        written = [*self.rollouts.glob("train-*.jsonl"), *self.rollouts.glob("val-*.jsonl")]
        for path in [*written, *self.checkpoints.glob("rollout-step=*.ckpt")]:
            found = _STEP.search(path.name)
            if found and int(found[1]) > step:
                path.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Args:
        path: where to; folders are made.
        text: what to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
