"""LightningCLI for the verbs fit, validate, test and predict, with run folders, defaults and checks of calibadv."""

from __future__ import annotations

import shlex
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import calibadv.calibrators
import calibadv.callbacks
import calibadv.engines
import calibadv.estimators
import calibadv.filters
import calibadv.losses
import calibadv.regularizers
import calibadv.retrieval
import calibadv.rewards  # noqa: F401  # only imported subclasses are listed in --help and accepted by short name
from calibadv.callbacks.checkpoint import RolloutCheckpoint
from calibadv.callbacks.progress import Progress
from calibadv.callbacks.results import Results
from calibadv.callbacks.rollout_writer import RolloutWriter
from calibadv.callbacks.run_start import RunStart
from calibadv.callbacks.tensorboard import TensorBoardPages, swept_settings
from calibadv.config.errors import explain
from calibadv.config.files import ConfigFile, Option, configs_folder, read_config
from calibadv.config.help import OPTION_HELP, VERBS, set_option_help
from calibadv.config.overlays import check_overlay_order, sft_config
from calibadv.config.run_setup import RunOptions, check_start, locate, resolve_start, resume_command
from calibadv.config.threads import limit_threads
from calibadv.config.trainer_checks import check_checkpoint, check_trainer, is_first_process, run_timestamp
from calibadv.config.user_errors import WRITE_ERRORS
from calibadv.data.datamodule import QuestionData
from calibadv.errors import StopRequestedError, UserError
from calibadv.module import SearchAgentModule
from calibadv.policy.precision import check_rate
from calibadv.runs.folder import StartPoint
from calibadv.runs.lock import RunLock
from calibadv.runs.logger import RunTensorBoardLogger
from calibadv.sft import DemonstrationData, SupervisedModule
from calibadv.training.evaluation import Prediction


class CalibadvCLI(LightningCLI):
    """LightningCLI that decides the run folder before anything is built, and writes nothing until all inputs are read.

    Without the lock of a run folder, everything is built and nothing is run. ``verb`` is the method of the Trainer that
    runs the command.
    """

    start: StartPoint
    checkpoints: RolloutCheckpoint

    def __init__(self, command: str, settings: Sequence[ConfigFile | Option], lock: RunLock | None = None) -> None:
        self.command = command
        self.verb = verb = "fit" if command == "sft" else command
        self.settings = settings
        self._lock = lock
        manners = {"exit_on_error": False, "allow_abbrev": False}
        usage = f"calibadv {command} [--config NAME_OR_FILE ...] [--option VALUE ...]"
        module, data = (SupervisedModule, DemonstrationData) if command == "sft" else (SearchAgentModule, QuestionData)
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(
            module,
            data,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={**manners, verb: {**manners, "usage": usage, "description": VERBS[command]}},
            args=[verb, *_command_words(settings, command)],
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # the base has no instance to look at
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        seed = self.seed_everything_default
        parser.add_argument("--seed_everything", type=int, default=seed, help=OPTION_HELP["seed_everything"])

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        parser.add_lightning_class_args(RolloutCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RolloutWriter, "rollouts")
        if self.command == "predict":
            parser.add_argument("--samples", type=int, default=1, help=OPTION_HELP["samples"])
            parser.add_argument("--temperature", type=float, default=0.0, help=OPTION_HELP["temperature"])
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        own = self._parser(self.verb)
        set_option_help(own)
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            options = [option for action in own._actions for option in action.option_strings]
            raise UserError(explain(str(error), options, self.verb)) from error

    @override
    def _parse_ckpt_path(self) -> None:
        """Read no hyperparameters from checkpoints, as LightningCLI would: they hold none, and may be large."""

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.verb]
        check_trainer(config.trainer)
        if config.ckpt_path == "auto" and self.verb != "fit":
            raise UserError("--ckpt_path auto is for fit, which may start anew; give last, or a checkpoint")
        folder = locate(config.run.root, config.run.name, self._default_name(), config.ckpt_path)
        if self._lock is not None and is_first_process():
            self._lock.take(folder)
        self.start = resolve_start(folder, config.ckpt_path)
        check_checkpoint(self.start.checkpoint, config.trainer)
        if self.verb in ("validate", "test"):
            config.verbose = False  # Progress prints the table
        if self.verb == "predict":
            config.return_predictions = False  # RolloutWriter writes them; Lightning would keep all in memory
        check_start(self.verb, self.start, config.model.get("rollout_steps"), config.ckpt_path)
        config.ckpt_path = self.start.checkpoint and str(self.start.checkpoint)

    def _default_name(self) -> str:
        prefix = [] if self.command in ("fit", "sft") else [self.verb]
        names = [setting.path.stem for setting in self.settings if isinstance(setting, ConfigFile)]
        return "-".join([*prefix, *names, f"seed{self.config[self.verb].seed_everything}", run_timestamp()])

    @property
    def resume_command(self) -> str:
        """Command that continues this run, or starts it again if it has no checkpoint yet."""
        ckpt_path = "last" if self.start.folder.checkpoints_newest_first() else "auto"
        return resume_command(self.command, self.settings, self.start.folder, ckpt_path)

    def resolved_config(self) -> str:
        """Return the whole config of this run as YAML."""
        config = self.config[self.verb].clone()
        config.ckpt_path = None
        config.run.name = None
        return str(self._parser(self.verb).dump(config, skip_none=False))

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.model.config = self.resolved_config()
        limit_threads(self.model.model)
        if self.command == "predict":
            config = self.config[self.verb]
            self.model.prediction = Prediction(config.samples, config.temperature)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        settings = dict(self._get(self.config_init, "trainer"))
        if settings["logger"] in (None, True):
            curves = RunTensorBoardLogger(self.start.folder.path, self.start.resumed_from)
            settings["logger"] = curves if self.verb == "fit" else False
        self.checkpoints = self._get(self.config_init, "checkpoint")
        words = [word for setting in self.settings for word in setting.words]
        rollouts = self._get(self.config_init, "rollouts")
        swept = swept_settings(yaml.safe_load(self.resolved_config()))
        # The user's callbacks run after RolloutWriter has written the step, which is finished then. Checkpoints hold
        # the state of all callbacks, so they come last.
        before = [
            RunStart(self.start, self.resolved_config()),
            Results(shlex.join(["calibadv", self.command, *words])),
            TensorBoardPages(swept, rollouts.every_n_rollout_steps),
            rollouts,
        ]
        settings["callbacks"] = [*before, *(settings["callbacks"] or []), self.checkpoints, Progress()]
        try:
            return pl.Trainer(**{**settings, "default_root_dir": str(self.start.folder.path), **kwargs})
        except (ValueError, ImportError, MisconfigurationException) as error:
            raise UserError(f"trainer: {error}") from error

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        if self._lock is None:
            return
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:
            if stop.code == 1:  # Lightning exits so after a KeyboardInterrupt
                raise KeyboardInterrupt from stop
            raise
        except StopRequestedError as stop:
            if not self.checkpoints.saved:
                raise UserError(f"the run was told to stop, and {self.checkpoints.kept}") from stop
        except Exception as error:
            if isinstance(error, OSError) and error.errno in WRITE_ERRORS and error.filename is None:
                error.filename = str(self.start.folder.path)
            if self.checkpoints.kept:
                error.add_note(f"{self.checkpoints.kept}; to go on:\n  {self.resume_command}")
            raise


class ReadingCLI(CalibadvCLI):
    """Reads and checks the settings of ``fit``, and builds nothing."""

    def __init__(self, settings: Sequence[ConfigFile | Option]) -> None:
        check_overlay_order(settings)
        super().__init__("fit", settings)

    @property
    def settings_of_fit(self) -> Namespace:
        """Settings of ``fit``."""
        settings: Namespace = self.config["fit"]
        return settings

    @override
    def before_instantiate_classes(self) -> None:
        settings = self.settings_of_fit
        check_trainer(settings.trainer)
        check_rate(settings.trainer.precision, settings.model.lora is not None, settings.model.learning_rate)

    @override
    def instantiate_classes(self) -> None:
        """Build nothing."""


def _command_words(settings: Sequence[ConfigFile | Option], command: str) -> list[str]:
    """Return the words that LightningCLI parses: the packaged base, then the settings, with paths for names."""
    words: list[str] = []
    base = read_config(configs_folder() / "base.yaml")
    for setting in [base, *settings]:
        if isinstance(setting, Option):
            words += setting.words
        else:
            words += ["--config", sft_config(setting, setting is base) if command == "sft" else str(setting.path)]
    return words
