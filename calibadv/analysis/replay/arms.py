"""The methods that one call of ``calibadv replay`` applies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from calibadv.analysis.replay.method import Method, ReplayedBatch, apply_method, decides_advantages, load_method
from calibadv.config.files import CALLBACKS, ConfigFile, configs_folder, read_config, resolve_config
from calibadv.config.overlays import check_overlay_order, is_calibration_callback
from calibadv.config.user_errors import user_message
from calibadv.errors import UserError
from calibadv.types import Rollout


@dataclass(frozen=True, slots=True)
class ReplayArm:
    """A named method.

    Attributes:
        name: unique among the arms of a call.
        method: reward, estimator and calibrators.
        ignored_settings: settings of its own overlays that do not affect the advantages of given rollouts.
    """

    name: str
    method: Method
    ignored_settings: tuple[str, ...] = ()

    def apply(self, rollouts: Sequence[Rollout]) -> ReplayedBatch:
        """Score a batch of rollouts and compute its advantages."""
        with _prefix_errors(self.name):
            return apply_method(rollouts, self.method)


def load_arms(words: Sequence[str], common: Sequence[str]) -> list[ReplayArm]:
    """Read and instantiate the methods of ``--arm``, each with the configs of ``--config`` before its own."""
    shared = [read_config(resolve_config(name)) for name in common]
    if not words:
        name = "+".join(config.name for config in shared) or "grpo"
        return [ReplayArm(name, _load(shared))]
    from calibadv.config.arms import read_arms

    arms = []
    for arm in read_arms(words):
        with _prefix_errors(arm.name):
            method = _load([*shared, *arm.overlays])
        arms.append(ReplayArm(arm.name, method, tuple(_ignored_settings(arm.overlays))))
    return arms


def _load(configs: Sequence[ConfigFile]) -> Method:
    check_overlay_order(configs)
    return load_method([configs_folder() / "base.yaml", *(config.path for config in configs)])


def _ignored_settings(overlays: Iterable[ConfigFile]) -> list[str]:
    """Settings that do not affect advantages, such as ``model.loss``."""
    keys = [
        ".".join(key.removesuffix("+").split(".")[:2])
        for overlay in overlays
        for key, value in overlay.values.items()
        if not (decides_advantages(key) or _only_calibrates(key, value))
    ]
    return list(dict.fromkeys(keys))


def _only_calibrates(key: str, value: object) -> bool:
    entries = value if isinstance(value, list) else [value]
    return key.removesuffix("+") == CALLBACKS and all(is_calibration_callback(entry) for entry in entries)


@contextmanager
def _prefix_errors(arm: str) -> Iterator[None]:
    """Prefix error messages for users with the name of the arm."""
    try:
        yield
    except ValueError as error:
        message = user_message(error)
        if message is None:
            raise
        raise UserError(f"arm '{arm}': {message}") from error
