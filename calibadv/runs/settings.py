"""Settings of a run: flattened, compared, and as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Settings that may differ between the runs of one arm: they change no figure, or are the seed.
_IGNORED_SETTINGS = (
    "seed_everything",
    "run",
    "ckpt_path",
    "weights_only",
    "checkpoint",
    "rollouts",
    "trainer.logger",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.default_root_dir",
)


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists to dotted keys."""
    if isinstance(settings, dict) and settings:
        items = list(settings.items())
    elif isinstance(settings, list) and settings:
        items = list(enumerate(settings))
    else:
        return {prefix: settings}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def method_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that define an arm, with dotted keys."""
    ignored = tuple(f"{name}." for name in _IGNORED_SETTINGS)
    return {key: value for key, value in _flatten_parts(config).items() if not f"{key}.".startswith(ignored)}


def _flatten_parts(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten mappings, with ``class_path`` and ``init_args`` left out of the keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix if key in ("class_path", "init_args") else f"{prefix}.{key}" if prefix else key
        found |= _flatten_parts(value, name) if isinstance(value, dict) else {name: value}
    return found


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the settings that a resume has changed, each with its values before and now."""
    first, second = method_settings(before), method_settings(now)
    keys = [key for key in dict.fromkeys([*first, *second]) if key != "model.rollout_steps"]
    changed = [key for key in keys if first.get(key) != second.get(key)]
    return [f"{key} {as_text(first.get(key))} (now {as_text(second.get(key))})" for key in changed]


def as_text(value: Any) -> str:
    """Format a setting in one line, classes as calls."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{key}={as_text(item)}" for key, item in (value.get("init_args") or {}).items())
        name = value["class_path"].rpartition(".")[2]
        return f"{name}({arguments})" if arguments else name
    if isinstance(value, list):
        return f"[{', '.join(as_text(item) for item in value)}]"
    if isinstance(value, str):
        return value.rpartition(".")[2] if value.startswith("calibadv.") else value
    return json.dumps(value, sort_keys=True)
