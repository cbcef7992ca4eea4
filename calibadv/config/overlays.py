"""Config files over each other: settings that later files would silently discard, and configs of fit for sft."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import yaml

from calibadv.config.files import CALLBACKS, ConfigFile, Option, read_yaml
from calibadv.data.datamodule import QuestionData
from calibadv.errors import UserError
from calibadv.module import SearchAgentModule
from calibadv.sft import DemonstrationData, SupervisedModule

# How a policy is optimized by reinforcement says nothing of how to fit it to demonstrations.
_OF_OPTIMIZATION = ("learning_rate", "schedule", "warmup_steps", "betas", "weight_decay", "optimizer", "lr_scheduler")


def check_overlay_order(settings: Sequence[ConfigFile | Option]) -> None:
    """Check that no setting is discarded by a later file, and that one AdvantageCalibration at most is installed."""
    for index, setting in enumerate(settings):
        _check_not_overridden(setting, [later for later in settings[index + 1 :] if isinstance(later, ConfigFile)])
    names = [name for name, _ in installed_calibrations(settings)]
    if len(names) > 1:
        raise UserError(
            f"{' and '.join(repr(name) for name in names)} each install an AdvantageCalibration; give one overlay that "
            "lists all calibrators in one such callback, as calibrators/calibadv does"
        )


def _check_not_overridden(setting: ConfigFile | Option, later: Sequence[ConfigFile]) -> None:
    owners = {key: _overridden_by(key, later) for key in setting.values}
    last = next((other.name for other in reversed(later) if other.name in owners.values()), None)
    if last is None:
        return
    if all(owners.values()):
        raise UserError(
            f"'{setting.name}' has no effect: later configs override all its keys; leave it out, or put it after "
            f"'{last}'"
        )
    for key, owner in owners.items():
        if key.endswith("+") and owner:
            raise UserError(
                f"what '{setting.name}' appends to {key[:-1]} is lost: '{owner}' sets the whole list afterwards; "
                f"put '{setting.name}' after '{owner}'"
            )


def _overridden_by(key: str, later: Sequence[ConfigFile]) -> str | None:
    """Return the last file that sets the key or a parent of it, or a class without such an option."""
    parts = key.removesuffix("+").split(".")
    for config in reversed(later):
        for end in range(1, len(parts) + 1):
            if ".".join(parts[:end]) in config.values or _removes_option(parts[:end], parts[end:], config):
                return config.name
    return None


def _removes_option(owner: list[str], rest: list[str], config: ConfigFile) -> bool:
    """Return True if a file sets a class for ``owner`` that does not take the option ``rest``."""
    new = config.values.get(".".join([*owner, "class_path"]))
    option = rest[rest[:1] == ["init_args"] :]
    if not isinstance(new, str) or not option:
        return False
    try:
        accepted = options_of(new)
    except (ImportError, AttributeError, ValueError):
        return False  # the parser reports the class
    return option[0] not in accepted and all(entry.kind is not entry.VAR_KEYWORD for entry in accepted.values())


def options_of(class_path: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a class's constructor."""
    module, _, name = class_path.rpartition(".")
    return inspect.signature(getattr(import_module(module), name)).parameters


def installed_calibrations(configs: Sequence[ConfigFile | Option]) -> list[tuple[str, Any]]:
    """Return the AdvantageCalibration callbacks left after all files and options, each with the name of its setting."""
    found: list[tuple[str, Any]] = []
    for config in configs:
        if CALLBACKS in config.values:
            found = []
        for key in (CALLBACKS, f"{CALLBACKS}+"):
            value = config.values.get(key) or []
            entries = value if isinstance(value, list) else [value]
            found += [(config.name, entry) for entry in entries if is_calibration_callback(entry)]
    return found


def is_calibration_callback(entry: Any) -> bool:
    """Return True if an entry of ``trainer.callbacks`` is an AdvantageCalibration."""
    name = entry.get("class_path") if hasattr(entry, "get") else entry
    return isinstance(name, str) and name.rpartition(".")[2] == "AdvantageCalibration"


def sft_config(config: ConfigFile, is_base: bool) -> str:
    """Return a config without the settings that only ``fit`` has, as YAML.

    One config then describes model, protocol and retriever to both commands. A config that has such settings is one for
    ``fit``, and its learning rate and schedule are left out as well.
    """
    content = read_yaml(config.path)
    model, data = content.get("model", {}), content.get("data", {})
    for_fit = [f"model.{key}" for key in _only(SearchAgentModule, SupervisedModule, model)]
    for_fit += [f"data.{key}" for key in _only(QuestionData, DemonstrationData, data)]
    if not for_fit:
        return str(config.path)
    of_run = () if is_base else (*(f"model.{key}" for key in _OF_OPTIMIZATION), "trainer.val_check_interval")
    left_out = {*for_fit, *of_run}
    for section, values in content.items():
        if isinstance(values, dict):
            content[section] = {key: value for key, value in values.items() if f"{section}.{key}" not in left_out}
    return yaml.safe_dump(content)


def _only(fit: type[Any], sft: type[Any], given: Any) -> list[str]:
    """The keys that one class takes and the other does not."""
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (fit, sft))
    return [key for key in (given if isinstance(given, dict) else ()) if key in ours and key not in theirs]
