"""The first callback of a run: makes or opens its folder."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as pl
import yaml
from rich.console import Console
from typing_extensions import override

from calibadv.io.files import write_atomically
from calibadv.runs.folder import StartPoint
from calibadv.runs.logger import RunTensorBoardLogger
from calibadv.runs.settings import changed_settings

log = logging.getLogger(__name__)


class RunStart(pl.Callback):
    """Write the first files of a run, its resolved config among them, after everything that can be refused has been."""

    def __init__(self, start: StartPoint, config: str) -> None:
        self.start = start
        self.config = config

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = self.start
        if trainer.is_global_zero:
            if start.starts_over:
                start.folder.clear()
            if start.checkpoint is not None and start.resumed_from is not None:
                _warn_of_changes(start.folder.newest_config(), self.config)
                start.folder.truncate_after(start.resumed_from)
                start.folder.reopen()
                Console(soft_wrap=True).print(
                    f"going on after rollout step {start.resumed_from}, from {start.checkpoint}", highlight=False
                )
                start.folder.link_last(start.checkpoint)
            if start.resumed_from is None:
                start.folder.create(self.config)
            else:
                write_atomically(start.folder.config(start.resumed_from), self.config)
        for logger in trainer.loggers:
            if isinstance(logger, RunTensorBoardLogger):
                logger.open()


def _warn_of_changes(before: Path, config: str) -> None:
    """Say what a resume makes different, which may be meant, and may be a forgotten overlay."""
    if not before.exists():  # resumed from a checkpoint of another run
        return
    if changed := changed_settings(yaml.safe_load(before.read_text("utf-8")), yaml.safe_load(config)):
        log.warning("this run goes on with other settings than before: %s", ", ".join(changed))
