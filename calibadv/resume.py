"""What a checkpoint says of its run beside the weights, and whether a run may go on from it."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from calibadv.errors import UserError

if TYPE_CHECKING:
    from calibadv.module import SearchAgentModule

log = logging.getLogger(__name__)


def save_identity(checkpoint: dict[str, Any], module: SearchAgentModule) -> None:
    """Put into a checkpoint what tells its run from another.

    Args:
        checkpoint: written to.
        module: the run's.
    """
    checkpoint["seed"] = module.seed
    checkpoint["rollout_step"] = module.rollout_step
    checkpoint["validated_step"] = module.validated_step
    checkpoint["skipped_in_a_row"] = module.skipped.in_a_row
    checkpoint["protocol"] = asdict(module.agent.protocol)
    if module.reference is not None:
        checkpoint["reference_checksum"] = module.reference.checksum()


def check_identity(checkpoint: dict[str, Any], module: SearchAgentModule, verb: str | None) -> None:
    """Refuse to train on as another run; say where an evaluation asks otherwise than the policy was trained.

    Args:
        checkpoint: of ``save_identity``.
        module: of the run that loads it.
        verb: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        UserError: nothing is left to train, or the seed, the protocol or the reference is another.
    """
    if verb == "fit":
        _check_resume(checkpoint, module)
    changed = _changed_protocol(checkpoint, module)
    if changed and verb == "fit":
        raise UserError(f"the checkpoint's run has another protocol: {changed}; resume with its own")
    if changed:
        log.warning("the checkpoint was trained with another protocol: %s; the figures depend on it", changed)
    if module.reference is not None:
        _check_reference(checkpoint, module.reference.checksum())


def _changed_protocol(checkpoint: dict[str, Any], module: SearchAgentModule) -> str:
    now = asdict(module.agent.protocol)
    then = {**now, **checkpoint.get("protocol", {})}
    return ", ".join(f"model.protocol.{name} {then[name]} (now {now[name]})" for name in now if then[name] != now[name])


def _check_resume(checkpoint: dict[str, Any], module: SearchAgentModule) -> None:
    done = checkpoint["rollout_step"]
    if done >= module.rollout_steps:
        raise UserError(
            f"nothing is left to do: the checkpoint holds {done} rollout steps and model.rollout_steps is "
            f"{module.rollout_steps}; raise it to go on"
        )
    if checkpoint["seed"] != module.seed:
        raise UserError(
            f"--seed_everything is {module.seed} and the checkpoint's run has {checkpoint['seed']}; all draws of a "
            "run depend on one seed, so resume with that"
        )


def _check_reference(checkpoint: dict[str, Any], checksum: str) -> None:
    if "reference_checksum" not in checkpoint:
        raise UserError(
            "model.kl_coef is above 0, and the checkpoint's run had no reference; resume with model.kl_coef 0"
        )
    if checkpoint["reference_checksum"] != checksum:
        raise UserError(
            "model.policy does not hold the weights that the checkpoint's run started from, so the KL would be "
            "measured against another reference; give the same folder"
        )
