"""Compatibility of a checkpoint with the run that loads it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from calibadv.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """The fingerprint of a run, which its checkpoints hold."""

    seed: int  # seed of all draws
    protocol: Mapping[str, Any]  # settings of the protocol
    reference: str | None  # digest of its weights; empty for the policy without adapters, None without one

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the entries of a checkpoint."""
        entries: dict[str, Any] = {"seed": self.seed, "protocol": dict(self.protocol)}
        return entries if self.reference is None else {**entries, "reference_checksum": self.reference}

    def check(self, checkpoint: Mapping[str, Any], training: bool) -> None:
        """Refuse to train on as another run; warn where an evaluation uses another protocol than the training."""
        if training and checkpoint["seed"] != self.seed:
            raise UserError(
                f"--seed_everything is {self.seed} and the checkpoint's run has {checkpoint['seed']}; all draws of a "
                "run depend on one seed, so resume with that"
            )
        changed = self._changed_protocol(checkpoint)
        if changed and training:
            raise UserError(f"the checkpoint's run has another protocol: {changed}; resume with its own")
        if changed:
            log.warning("the checkpoint was trained with another protocol: %s; the figures depend on it", changed)
        if self.reference is not None:
            self._check_reference(checkpoint)

    def _changed_protocol(self, checkpoint: Mapping[str, Any]) -> str:
        now = self.protocol
        then = {**now, **checkpoint.get("protocol", {})}
        changed = [name for name in now if then[name] != now[name]]
        return ", ".join(f"model.protocol.{name} {then[name]} (now {now[name]})" for name in changed)

    def _check_reference(self, checkpoint: Mapping[str, Any]) -> None:
        if "reference_checksum" not in checkpoint:
            raise UserError(
                "model.kl_coef is above 0, and the checkpoint's run had no reference; resume with model.kl_coef 0"
            )
        if checkpoint["reference_checksum"] != self.reference:
            raise UserError(
                "model.policy does not hold the weights that the checkpoint's run started from, so the KL would be "
                "measured against another reference; give the same folder"
            )


def check_steps_left(checkpoint: Mapping[str, Any], rollout_steps: int) -> None:
    """Refuse to resume a run that has done more rollout steps than are asked for."""
    done = checkpoint["rollout_step"]
    if done > rollout_steps:
        raise UserError(
            f"nothing is left to do: the checkpoint holds {done} rollout steps and model.rollout_steps is "
            f"{rollout_steps}; raise it to go on"
        )


def check_weights(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights of other names or shapes than the policy's."""
    for name in {**own, **weights}:
        there, wanted = (tuple(of[name].shape) if name in of else None for of in (weights, own))
        if there != wanted:
            shown = [f"has no {name}" if shape is None else f"has {name} of {list(shape)}" for shape in (there, wanted)]
            raise UserError(
                f"the checkpoint {shown[0]}, and the policy {shown[1]}; give model.policy and model.lora as the "
                "checkpoint's run had them"
            )


def check_optimizer(states: Sequence[Any], trained: Sequence[nn.Parameter]) -> None:
    """Refuse an optimizer state that does not fit the trained parameters.

    The optimizer itself would notice other shapes in its first step only, when files of the run are gone already.
    """
    content = states[0] if len(states) == 1 and isinstance(states[0], dict) else {}
    if misfit := _misfit(content.get("state", {}), content.get("param_groups", []), trained):
        raise UserError(
            f"the checkpoint's optimizer state does not fit the policy ({misfit}); resume from another checkpoint"
        )


def _misfit(state: Mapping[Any, Any], groups: Sequence[Any], trained: Sequence[nn.Parameter]) -> str | None:
    needed = {"exp_avg"} if any("betas" in group for group in groups) else set()
    wrong = next((f"parameter {n}" for n, values in state.items() if not _fits(values, trained, n, needed)), None)
    grouped = sum(len(group.get("params", ())) for group in groups)
    whole = grouped == len(trained) and len(state) in (0, len(trained))
    return wrong or (None if whole else f"{len(state)} of {len(trained)} parameters")


def _fits(values: Any, trained: Sequence[nn.Parameter], index: Any, needed: set[str]) -> bool:
    if not isinstance(values, dict) or not isinstance(index, int) or not 0 <= index < len(trained):
        return False
    if not needed <= values.keys():
        return False
    moments = [value for value in values.values() if isinstance(value, Tensor) and value.dim() > 0]
    return all(moment.shape == trained[index].shape for moment in moments)
