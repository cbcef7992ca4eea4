"""The curves of a run, as TensorBoard events in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override


class RunCurves(TensorBoardLogger):
    """TensorBoard's logger for a run folder: nothing is written before ``open``, and no file of hyperparameters.

    Args:
        folder: of the run; the event files lie directly in it.
        resumed_from: rollout steps done at the checkpoint; what earlier event files hold beyond it is hidden. None for
            a run that starts from nothing.
    """

    def __init__(self, folder: Path, resumed_from: int | None) -> None:
        # TensorBoard hides what lies beyond from the second marked start on, so the first one is marked too.
        super().__init__(folder, name="", version="", purge_step=0 if resumed_from is None else resumed_from + 1)
        self._is_open = False

    def open(self) -> None:
        """Let the event file be made: all that can be refused has been."""
        self._is_open = True

    @property
    @override
    def experiment(self) -> Any:
        if not self._is_open:
            raise AttributeError("the curves of a run are opened when it starts")
        return super().experiment

    @override
    def save(self) -> None:
        if self._is_open:
            self.experiment.flush()
