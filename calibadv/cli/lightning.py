"""The verbs fit, validate, test and predict: LightningCLI with our run folders, defaults and manners."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

import calibadv.calibrators
import calibadv.callbacks
import calibadv.engines
import calibadv.estimators
import calibadv.losses
import calibadv.retrieval
import calibadv.rewards  # noqa: F401  # only imported subclasses are listed in --help and accepted by short name
from calibadv.callbacks.checkpoint import RolloutCheckpoint
from calibadv.callbacks.progress import Progress
from calibadv.callbacks.results import Results
from calibadv.callbacks.rollout_writer import RolloutWriter
from calibadv.cli.configs import configs_folder, resolve_config, scan_overlays
from calibadv.cli.errors import explain, report
from calibadv.cli.quiet import quiet_libraries
from calibadv.data import QuestionData
from calibadv.module import SearchAgentModule
from calibadv.run_folder import RunFolder, write_atomically


@dataclass
class Run:
    """Where the run's files go: ``<root>/<name>/``."""

    root: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """Name of this run; by default made of the configs' names and the time."""


class CalibadvCLI(LightningCLI):
    """LightningCLI, with a run folder decided before anything is built, and nothing written until all inputs are read.

    Args:
        configs: names of the configs on the command line, for the default name of the run.
        **kwargs: of LightningCLI.
    """

    def __init__(self, configs: Sequence[Path], **kwargs: Any) -> None:
        self.config_names = [path.stem for path in configs]
        self.run_folder: RunFolder | None = None
        self.ckpt_path: Path | None = None
        self.checkpoint_step = 0
        super().__init__(
            SearchAgentModule,
            QuestionData,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder, our callbacks, and the links that state a fact once.

        Args:
            parser: of one verb.
        """
        parser.add_class_arguments(Run, "run")
        parser.add_lightning_class_args(RolloutCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RolloutWriter, "rollouts")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def _parse_ckpt_path(self) -> None:
        """Skip LightningCLI's reading of hyperparameters from checkpoints: ours hold none, and may be large."""

    def before_instantiate_classes(self) -> None:
        """Decide on the run folder, and refuse what would mix two runs."""
        config = self.config[self.subcommand]
        asked = config.get("ckpt_path")
        if asked == "last" and config.run.name is None:
            raise ValueError("--ckpt_path last: name the run to resume with --run.name (its folder under --run.root)")
        if config.run.name is not None:
            self.run_folder = RunFolder(Path(config.run.root) / config.run.name)
        elif asked is not None:
            self.run_folder = RunFolder(Path(asked).resolve().parent.parent)
        else:
            self.run_folder = RunFolder(Path(config.run.root) / self._default_name())
        if asked is not None:
            self.ckpt_path = self.run_folder.newest_checkpoint() if asked == "last" else Path(asked)
            if not self.ckpt_path.exists():
                raise ValueError(f"--ckpt_path {asked} does not exist; give a checkpoint, or 'last' with --run.name")
            config.ckpt_path = str(self.ckpt_path)
            self.checkpoint_step = torch.load(self.ckpt_path, weights_only=True, mmap=True)["rollout_step"]
        elif self.subcommand == "fit" and (self.run_folder.path / "config.yaml").exists():
            raise ValueError(
                f"{self.run_folder.path} holds a run already; resume it with '{self.resume_command}', "
                "or choose another --run.name"
            )

    def _default_name(self) -> str:
        verb = [] if self.subcommand == "fit" else [str(self.subcommand)]
        return "-".join([*verb, *self.config_names, datetime.now().strftime("%Y%m%d-%H%M%S")])

    def resolved_config(self) -> str:
        """Give the whole config of this run.

        Returns:
            YAML that ``--config`` reads.
        """
        parser, config = self._parser(self.subcommand), self.config[self.subcommand]
        return str(parser.dump(config, skip_none=False))

    @property
    def resume_command(self) -> str:
        """What to type to go on with this run."""
        assert self.run_folder is not None
        words, skip = [], False
        for word in sys.argv[1:]:
            if skip:
                skip = False
            elif word in ("--ckpt_path", "--run.name"):
                skip = True
            elif not word.startswith(("--ckpt_path=", "--run.name=")):
                words.append(word)
        return shlex.join(["calibadv", *words, "--run.name", self.run_folder.path.name, "--ckpt_path", "last"])

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer, with our logger and callbacks.

        Args:
            **kwargs: of the trainer.

        Returns:
            The trainer.
        """
        assert self.run_folder is not None
        settings = dict(self._get(self.config_init, "trainer"))
        if settings["logger"] in (None, True):
            purge = self.checkpoint_step + 1 if self.checkpoint_step else None
            settings["logger"] = TensorBoardLogger(self.run_folder.path, name="", version="", purge_step=purge)
        self.checkpoint_callback = self._get(self.config_init, "checkpoint")
        # Checkpoints hold the state of Results, so what a validation adds to it comes first.
        ours = [
            RunStart(self),
            self._get(self.config_init, "rollouts"),
            Results(),
            self.checkpoint_callback,
            Progress(),
        ]
        settings["callbacks"] = [*(settings["callbacks"] or []), *ours]
        return pl.Trainer(**{**settings, "default_root_dir": str(self.run_folder.path), **kwargs})

    def goodbye(self) -> int:
        """Say where to look, and after a signal how to continue.

        Returns:
            The exit status.
        """
        assert self.run_folder is not None
        console, path = Console(), self.run_folder.path
        stopped_by = self.checkpoint_callback.stopped_by
        if self.subcommand == "fit":
            validations = self.run_folder.read_results().get("validations", [])
            if len(validations) > 1 and "f1" in validations[-1]:
                first, last = validations[0], validations[-1]
                console.print(
                    f"validation F1 {first['f1']:.3f} (step {first['step']}) -> {last['f1']:.3f} (step {last['step']})",
                    highlight=False,
                )
            console.print(f"curves      tensorboard --logdir {path}", highlight=False, soft_wrap=True)
            console.print(f"checkpoint  {self.run_folder.checkpoints / 'last.ckpt'}", highlight=False, soft_wrap=True)
            console.print(f"results     {self.run_folder.results}", highlight=False, soft_wrap=True)
        console.print(f"rollouts    {self.run_folder.rollouts}", highlight=False, soft_wrap=True)
        if stopped_by is None:
            return 0
        console.print(f"stopped after rollout step {self.model.rollout_step}; to continue:", highlight=False)
        console.print(f"  {self.resume_command}", highlight=False, soft_wrap=True)
        return 128 + int(stopped_by)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without LightningCLI's warning that arguments came from a program.

        Args:
            parser: of all verbs.
            args: the words of the command line.
        """
        self.config = parser.parse_args(args)


class RunStart(pl.Callback):
    """Write the first files of a run, after everything that can be refused has been.

    Args:
        cli: knows the run folder and the resolved config.
    """

    def __init__(self, cli: CalibadvCLI) -> None:
        self.cli = cli

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the config; when resuming, drop what the run will write again."""
        folder, step = self.cli.run_folder, self.cli.checkpoint_step
        assert folder is not None
        if step:
            folder.drop_beyond(step)
        write_atomically(folder.config(step), self.cli.resolved_config())


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Run fit, validate, test or predict.

    Args:
        verb: one of the four.
        arguments: the words behind it.

    Returns:
        The exit status: 0, 2 for a mistake in the arguments, or 128 + signal after an orderly stop.
    """
    quiet_libraries()
    configs, words = place_configs(arguments)
    scan_overlays(configs)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    settings = {"exit_on_error": False, "allow_abbrev": False}
    try:
        cli = CalibadvCLI(
            configs,
            args=[verb, *words],
            parser_kwargs={**settings, **{name: dict(settings) for name in LightningCLI.subcommands()}},
        )
    except ArgumentError as error:
        report(explain(str(error)))
        return 2
    return cli.goodbye()


def place_configs(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Put the packaged base before the configs that the user names, and resolve their names.

    Args:
        arguments: the words behind the verb.

    Returns:
        The config files of the user, in order; and the words with paths in the place of names, the base first.
    """
    words: list[str] = []
    configs: list[Path] = []
    rest = iter(arguments)
    for word in rest:
        option, equals, value = word.partition("=")
        if option in ("--config", "-c"):
            configs.append(resolve_config(value if equals else next(rest, "")))
            words += ["--config", str(configs[-1])]
        else:
            words.append(word)
    return configs, ["--config", str(configs_folder() / "base.yaml"), *words]
