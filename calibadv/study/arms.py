"""The arms of a study: their names, their overlays, and the settings that ``fit`` makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import Namespace

from calibadv.calibrators import check_combination
from calibadv.callbacks import AdvantageCalibration
from calibadv.config.arms import Arm, check_not_per_run
from calibadv.config.files import ConfigFile, Option
from calibadv.config.lightning_cli import ReadingCLI
from calibadv.config.overlays import check_overlay_order
from calibadv.config.user_errors import user_message
from calibadv.errors import UserError
from calibadv.io.progress_bar import tracked

Settings = dict[str, Any]

# Parts that may be large, remote or start something, and their replacements while a method is checked.
_PLACEHOLDERS: dict[str, Any] = {
    **dict.fromkeys(("trainer.logger", "trainer.profiler", "trainer.plugins", "model.lora")),
    "trainer.strategy": "auto",
    "model.policy": "embedded",
    "model.engine": Namespace({"class_path": "calibadv.engines.TransformersEngine"}),  # type: ignore[no-untyped-call]
    "model.retriever.class_path": "calibadv.retrieval.BM25",
    "model.retriever.init_args": Namespace({"corpus": "embedded"}),  # type: ignore[no-untyped-call]
}


def resolve_arms(arms: Sequence[Arm], common: Sequence[ConfigFile | Option]) -> dict[str, Settings]:
    """Return the settings of every arm, resolved as ``fit`` would."""
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
        _check_not_overridden(option, arm.overlays)
    cli = ArmCLI([*files, *arm.overlays, *options])
    if cli.settings_of_fit.ckpt_path is not None:
        check_not_per_run("ckpt_path", f"ckpt_path ({cli.settings_of_fit.ckpt_path})")
    if cli.settings_of_fit.trainer.max_time is not None:
        raise UserError(
            "trainer.max_time would end the runs of a study after a random number of rollout steps; leave it out"
        )
    cli.build_method()
    settings: Settings = yaml.safe_load(cli.resolved_config())
    return settings


def _check_not_overridden(option: Option, overlays: Sequence[ConfigFile]) -> None:
    for key in option.values:
        for overlay in overlays:
            if any(f"{own.removesuffix('+')}.".startswith(f"{key}.") for own in overlay.values):
                raise UserError(f"{option.name} would override '{overlay.name}' of this arm; leave one of the two out")


class ArmCLI(ReadingCLI):
    """Reads the settings of an arm as ``fit`` does."""

    def build_method(self) -> None:
        """Build the parts once, so that their constructors check the settings.

        The policy, the engine and the retriever are replaced by those of the embedded default.
        """
        config = self.config.clone()
        settings = config["fit"]
        for key, value in _PLACEHOLDERS.items():
            settings[key] = value
        built = self.parser.instantiate_classes(config)["fit"]
        callbacks = built.trainer.callbacks or []
        installed = [callback.calibrators for callback in callbacks if isinstance(callback, AdvantageCalibration)]
        check_combination(built.model.estimator, installed[-1] if installed else [], built.model.group_size)
