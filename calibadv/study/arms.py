"""The arms of a study: their names, their overlays, and the settings that ``fit`` makes of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import Namespace

from calibadv.calibrators import check_combination
from calibadv.callbacks import AdvantageCalibration
from calibadv.config.files import ConfigFile, Option, read_config, resolve_config
from calibadv.config.lightning_cli import ReadingCLI
from calibadv.config.overlays import check_overlay_order
from calibadv.config.user_errors import user_message
from calibadv.errors import UserError
from calibadv.io.progress_bar import tracked
from calibadv.study.options import refuse_per_run

Settings = dict[str, Any]

REPORT = "report"
# What may be large, elsewhere, or start something, and what stands for it while a method is checked.
_IN_PLACE: dict[str, Any] = {
    **dict.fromkeys(("trainer.logger", "trainer.profiler", "trainer.plugins", "model.lora")),
    "trainer.strategy": "auto",
    "model.policy": "embedded",
    "model.engine": Namespace({"class_path": "calibadv.engines.TransformersEngine"}),  # type: ignore[no-untyped-call]
    "model.retriever.class_path": "calibadv.retrieval.BM25",
    "model.retriever.init_args": Namespace({"corpus": "embedded"}),  # type: ignore[no-untyped-call]
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Arm:
    """One method of a study.

    Attributes:
        name: also of its folder.
        overlays: config files that come after those of all arms.
    """

    name: str
    overlays: tuple[ConfigFile, ...] = ()


def read_arms(words: Sequence[str]) -> list[Arm]:
    """Read the values of ``--arm``."""
    arms: list[Arm] = []
    for word in words:
        arm = _read_arm(word)
        if any(arm.name.lower() == other.name.lower() for other in arms):  # as file systems may take it
            raise UserError(f"arm '{arm.name}' is there twice; give every arm a name of its own")
        arms.append(arm)
    return arms


def _read_arm(word: str) -> Arm:
    name, equals, overlays = word.partition("=")
    if not _NAME.fullmatch(name):
        raise UserError(
            f"arm '{name}': a name has letters, digits, '_', '-' and '.', and begins with one of the first two"
        )
    if name.lower() == REPORT:
        raise UserError(f"arm '{name}': the folder of this name is that of the report; give another name")
    try:
        files = tuple(read_config(resolve_config(overlay)) for overlay in (overlays.split("+") if equals else ()))
        for file in files:
            for key in file.values:
                refuse_per_run(key, f"'{key}' of '{file.name}'")
    except ValueError as error:
        raise UserError(f"arm '{name}': {error}") from error
    return Arm(name, files)


def resolve_arms(arms: Sequence[Arm], common: Sequence[ConfigFile | Option]) -> dict[str, Settings]:
    """Make the settings of every arm, as ``fit`` would."""
    check_overlay_order(common)
    resolved: dict[str, Settings] = {}
    for arm in tracked(arms, "Checking arms", len(arms)):
        try:
            resolved[arm.name] = _resolve(arm, common)
        except ValueError as error:
            raise UserError(f"arm '{arm.name}': {user_message(error) or error}") from error
    return resolved


def _resolve(arm: Arm, common: Sequence[ConfigFile | Option]) -> Settings:
    files = [setting for setting in common if isinstance(setting, ConfigFile)]
    options = [setting for setting in common if isinstance(setting, Option)]
    for option in options:
        _refuse_to_undo(option, arm.overlays)
    cli = ArmCLI([*files, *arm.overlays, *options])
    if cli.settings_of_fit.ckpt_path is not None:
        refuse_per_run("ckpt_path", f"ckpt_path ({cli.settings_of_fit.ckpt_path})")
    if cli.settings_of_fit.trainer.max_time is not None:
        raise UserError("trainer.max_time would end the runs of a study after rollout steps of chance; leave it out")
    cli.build_method()
    settings: Settings = yaml.safe_load(cli.resolved_config())
    return settings


def _refuse_to_undo(option: Option, overlays: Sequence[ConfigFile]) -> None:
    for key in option.values:
        for overlay in overlays:
            if any(f"{own.removesuffix('+')}.".startswith(f"{key}.") for own in overlay.values):
                raise UserError(
                    f"{option.name} sets in every arm what '{overlay.name}' sets in this one; leave one of the two out"
                )


class ArmCLI(ReadingCLI):
    """Reads an arm."""

    def build_method(self) -> None:
        """Build the parts once, to meet what their constructors refuse.

        The policy, the engine and the retriever are those of the embedded default.
        """
        config = self.config.clone()
        settings = config["fit"]
        for key, value in _IN_PLACE.items():
            settings[key] = value
        built = self.parser.instantiate_classes(config)["fit"]
        callbacks = built.trainer.callbacks or []
        installed = [callback.calibrators for callback in callbacks if isinstance(callback, AdvantageCalibration)]
        check_combination(built.model.estimator, installed[-1] if installed else [], built.model.group_size)
