"""Writing a trained policy as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers import GenerationConfig

from calibadv.errors import UserError
from calibadv.export.agent import AGENT_FILE, TrainedAgent, load_agent
from calibadv.export.card import model_card
from calibadv.io.files import check_empty


def export(run: Path, out: Path, adapter: bool = False, policy: str | None = None) -> None:
    """Write the trained policy of a run, or of one checkpoint, as a Hugging Face folder.

    Args:
        run: Folder of a run, whose newest checkpoint is taken, or a checkpoint.
        out: Folder to write; it must be empty or not there.
        adapter: Write LoRA adapters alone, for peft, instead of the model with the adapters merged into its weights.
        policy: Folder that the run started from, if it is not at its old place any more.

    Raises:
        UserError: the folder holds something, the checkpoint cannot be read, or there are no adapters.
    """
    check_empty(out)
    agent = load_agent(run, policy)
    if agent.checkpoint is None:
        raise UserError(f"'{run}' is a Hugging Face folder already; give the folder of a run, or a checkpoint")
    model: Any = agent.policy.model
    is_adapted = bool(agent.model_settings.get("lora"))
    if adapter and not is_adapted:
        raise UserError(f"'{run}' has no adapters, since model.lora was not set; leave --adapter out")
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        if is_adapted and not adapter:
            model = model.merge_and_unload()
        if not adapter:
            model.generation_config = _generation_config(agent)
        model.save_pretrained(partial)
        agent.policy.tokenizer.backend.save_pretrained(partial)
        settings = {"protocol": agent.model_settings.get("protocol"), "top_k": agent.top_k}
        (partial / AGENT_FILE).write_text(yaml.safe_dump(settings), encoding="utf-8")
        (partial / "README.md").write_text(model_card(agent, out.name, adapter), encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _generation_config(agent: TrainedAgent) -> GenerationConfig:
    """The ids at which a message ends; sampling is left to whoever samples."""
    tokenizer = agent.policy.tokenizer
    return GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=sorted(tokenizer.end_ids) or None,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.backend.bos_token_id,
    )
