"""Configs written for ``fit``, as ``sft`` takes them."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import yaml

from calibadv.config.files import ConfigFile, read_yaml
from calibadv.data.datamodule import QuestionData
from calibadv.module import SearchAgentModule
from calibadv.sft import DemonstrationData, SupervisedModule

log = logging.getLogger(__name__)

# How a policy is optimized by reinforcement says nothing of how to fit it to demonstrations.
_OF_OPTIMIZATION = ("learning_rate", "schedule", "warmup_steps", "betas", "weight_decay", "optimizer", "lr_scheduler")


def sft_config(config: ConfigFile) -> str:
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
    left_out = {*for_fit, *(f"model.{key}" for key in _OF_OPTIMIZATION), "trainer.val_check_interval"}
    for section, values in content.items():
        if isinstance(values, dict):
            content[section] = {key: value for key, value in values.items() if f"{section}.{key}" not in left_out}
    return yaml.safe_dump(content)


def _only(fit: type[Any], sft: type[Any], given: Any) -> list[str]:
    """The keys that one class takes and the other does not."""
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (fit, sft))
    return [key for key in (given if isinstance(given, dict) else ()) if key in ours and key not in theirs]
