"""A trained agent: policy and protocol, read from a run, a checkpoint or an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from calibadv.errors import UserError
from calibadv.interfaces import Protocol
from calibadv.policy.loading import load_policy
from calibadv.policy.lora import Lora
from calibadv.policy.policy import Policy
from calibadv.protocol.reading import read_protocol
from calibadv.runs.checkpoints import damage, read_content
from calibadv.runs.folder import RunFolder
from calibadv.training.checkpoint_compat import check_weights

AGENT_FILE = "calibadv.yaml"
"""File of an exported folder that holds what the agent was trained with."""


@dataclass(frozen=True, slots=True)
class TrainedAgent:
    """A policy, and the language that it was trained to speak.

    Attributes:
        policy: model and tokenizer, adapters not merged.
        protocol: prompt, tags and limits.
        model_settings: the section ``model`` of the run's config.
        top_k: documents of a search, None if they are not known.
        run: folder of the run, None for an exported folder.
        checkpoint: what the weights were read from, None for an exported folder.
        step: rollout steps done.
    """

    policy: Policy
    protocol: Protocol
    model_settings: Mapping[str, Any] = field(default_factory=dict)
    top_k: int | None = None
    run: RunFolder | None = None
    checkpoint: Path | None = None
    step: int = 0


def load_agent(source: Path, policy: str | None = None) -> TrainedAgent:
    """Load a trained agent.

    Args:
        source: folder of a run, whose newest whole checkpoint is taken; a checkpoint; or a Hugging Face folder.
        policy: the folder that the run started from, where it is not at its old place any more.

    Returns:
        The agent, on the CPU in float32.

    Raises:
        UserError: there is nothing of the kind, it is damaged, or the weights do not fit the policy.
    """
    if (source / "config.json").is_file():
        return _from_folder(source)
    checkpoint = _find_checkpoint(source)
    content: dict[str, Any] = read_content(checkpoint)
    settings = _model_settings(content, checkpoint)
    protocol = read_protocol(settings.get("protocol"))
    lora = settings.get("lora")
    started_from = policy or str(settings["policy"])
    loaded = load_policy(started_from, Lora(**lora) if lora else None, protocol.tags, protocol.stop_strings)
    weights = {name.removeprefix("model."): value for name, value in _weights(checkpoint, content).items()}
    check_weights(weights, loaded.model.state_dict())
    loaded.model.load_state_dict(weights)
    run = RunFolder(checkpoint.absolute().parents[1])
    retriever = settings.get("retriever") or {}
    top_k = (retriever.get("init_args") or {}).get("top_k")
    return TrainedAgent(loaded, protocol, settings, top_k, run, checkpoint, int(content["rollout_step"]))


def _from_folder(folder: Path) -> TrainedAgent:
    file = folder / AGENT_FILE
    settings = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}
    protocol = read_protocol(settings.get("protocol"))
    policy = load_policy(str(folder), None, protocol.tags, protocol.stop_strings)
    return TrainedAgent(policy, protocol, settings, settings.get("top_k"))


def _find_checkpoint(source: Path) -> Path:
    if not source.exists():
        raise UserError(f"'{source}' does not exist; give the folder of a run, a checkpoint, or a Hugging Face folder")
    is_run = source.is_dir() and not (source / "meta.pt").is_file()
    found = RunFolder(source).checkpoints_newest_first() if is_run else [source]
    if not found:
        raise UserError(f"'{source}' holds no checkpoint and no model; give the folder of a run, or a checkpoint")
    reasons = []
    for checkpoint in found:
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint
        reasons.append(f"{checkpoint}: {reason}")
    raise UserError(f"no checkpoint can be read ({'; '.join(reasons)}); give another one")


def _model_settings(content: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The section ``model`` of the config in a checkpoint, or else in its run folder."""
    text = content.get("config")
    if not text:
        config = RunFolder(checkpoint.absolute().parents[1]).newest_config()
        if not config.is_file():
            raise UserError(f"checkpoint '{checkpoint}' holds no config, since its module was built in Python")
        text = config.read_text("utf-8")
    return dict(yaml.safe_load(text)["model"])


def _weights(checkpoint: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint; the shards of a sharded one are joined."""
    if checkpoint.is_dir():
        from lightning.fabric.utilities.load import _load_distributed_checkpoint

        joined: dict[str, Any] = _load_distributed_checkpoint(checkpoint)
        return dict(joined["state_dict"])
    return dict(content["state_dict"])
