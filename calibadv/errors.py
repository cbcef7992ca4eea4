"""Errors whose message is for the user: the command line prints it in one line, and no traceback."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave; the message names the value, the limit and the remedy."""


class ServiceError(RuntimeError):
    """A service that the run depends on does not answer, or not as it should."""


class StopRequestedError(Exception):
    """A signal asked the run to stop while it waited for something: the rollout step in progress is given up."""


class RollbackError(RuntimeError):
    """The run is to go on from an earlier checkpoint; ``calibadv fit`` does so by itself.

    Args:
        checkpoint: to go on from.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"CollapseGuard went back to a healthy checkpoint; to go on: --ckpt_path {checkpoint}")
        self.checkpoint = checkpoint
