"""What a checkpoint says of its run beside the weights, and whether a run may go on from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from calibadv.errors import UserError

if TYPE_CHECKING:
    from calibadv.module import SearchAgentModule

log = logging.getLogger(__name__)


def save_identity(checkpoint: dict[str, Any], module: SearchAgentModule) -> None:
    """Put into a checkpoint what tells its run from another."""
    checkpoint["seed"] = module.seed
    checkpoint["rollout_step"] = module.rollout_step
    checkpoint["validated_step"] = module.validated_step
    checkpoint["skipped_in_a_row"] = module.skipped.in_a_row
    checkpoint["protocol"] = asdict(module.agent.protocol)
    if module.reference is not None:
        checkpoint["reference_checksum"] = module.reference.checksum()


def check_identity(checkpoint: dict[str, Any], module: SearchAgentModule, verb: str | None) -> None:
    """Refuse to train on as another run; say where an evaluation asks otherwise than the policy was trained."""
    if verb == "fit":
        _check_resume(checkpoint, module)
    changed = _changed_protocol(checkpoint, module)
    if changed and verb == "fit":
        raise UserError(f"the checkpoint's run has another protocol: {changed}; resume with its own")
    if changed:
        log.warning("the checkpoint was trained with another protocol: %s; the figures depend on it", changed)
    if module.reference is not None:
        _check_reference(checkpoint, module.reference.checksum())
    if "state_dict" in checkpoint:  # in a sharded checkpoint torch compares the shards
        _check_weights(checkpoint["state_dict"], module)
        if verb == "fit":
            _check_optimizer(checkpoint["optimizer_states"], module)


def _check_weights(weights: Mapping[str, Tensor], module: SearchAgentModule) -> None:
    own = module.state_dict()
    for name in {**own, **weights}:
        there, wanted = (tuple(of[name].shape) if name in of else None for of in (weights, own))
        if there != wanted:
            shown = [f"has no {name}" if shape is None else f"has {name} of {list(shape)}" for shape in (there, wanted)]
            raise UserError(
                f"the checkpoint {shown[0]}, and the policy {shown[1]}; give model.policy and model.lora as the "
                "checkpoint's run had them"
            )


def _check_optimizer(states: Sequence[Any], module: SearchAgentModule) -> None:
    """The optimizer itself would notice other shapes in its first step only, when files of the run are gone already."""
    trained = [parameter for parameter in module.model.parameters() if parameter.requires_grad]
    content = states[0] if len(states) == 1 and isinstance(states[0], dict) else {}
    state, groups = content.get("state", {}), content.get("param_groups", [])
    wrong = [number for number, values in state.items() if not _fits(values, trained, number)]
    grouped = sum(len(group.get("params", ())) for group in groups)
    if wrong or len(groups) != 1 or grouped != len(trained) or len(state) not in (0, len(trained)):
        where = f"parameter {wrong[0]}" if wrong else f"{len(state)} of {len(trained)} parameters"
        raise UserError(
            f"the checkpoint's optimizer state does not fit the policy ({where}); resume from another checkpoint"
        )


def _fits(values: Any, trained: Sequence[nn.Parameter], number: Any) -> bool:
    if not isinstance(values, dict) or not isinstance(number, int) or not 0 <= number < len(trained):
        return False
    moments = [value for value in values.values() if isinstance(value, Tensor) and value.dim() > 0]
    return all(moment.shape == trained[number].shape for moment in moments)


def _changed_protocol(checkpoint: dict[str, Any], module: SearchAgentModule) -> str:
    now = asdict(module.agent.protocol)
    then = {**now, **checkpoint.get("protocol", {})}
    return ", ".join(f"model.protocol.{name} {then[name]} (now {now[name]})" for name in now if then[name] != now[name])


def _check_resume(checkpoint: dict[str, Any], module: SearchAgentModule) -> None:
    done = checkpoint["rollout_step"]
    if done > module.rollout_steps:
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
