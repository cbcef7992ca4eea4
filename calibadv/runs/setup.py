"""What a run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calibadv.runs.folder import RunFolder


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run's files go, and what it starts from.

    Attributes:
        folder: of the run.
        checkpoint: to start from, or None.
        resumed_from: rollout steps done at the checkpoint, None for a run that starts from nothing.
        starts_over: whether the folder holds an attempt that ended before its first checkpoint, to be replaced.
    """

    folder: RunFolder
    checkpoint: Path | None = None
    resumed_from: int | None = None
    starts_over: bool = False
