"""TensorBoard logger that writes the curves of a run into its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoard logger of a run folder, which writes nothing before ``open`` and no hyperparameter file.

    Event files are written directly into the folder. Points of earlier ones after ``resumed_from``, the rollout steps
    done at the checkpoint, are hidden.
    """

    def __init__(self, folder: Path, resumed_from: int | None) -> None:
        # TensorBoard hides points only from the second event file with a purge step on, so the first has one too.
        super().__init__(folder, name="", version="", purge_step=0 if resumed_from is None else resumed_from + 1)
        self._is_open = False

    def open(self) -> None:
        """Allow the event file to be made, once all inputs are checked."""
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
