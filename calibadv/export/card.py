"""The model card of an exported policy."""

from __future__ import annotations

import yaml

from calibadv.export.agent import TrainedAgent
from calibadv.runs.versions import versions

# Settings of a run that a reader of the card asks for first.
_SHOWN = (
    "policy",
    "lora",
    "estimator",
    "loss",
    "regularizers",
    "kl_coef",
    "rollout_steps",
    "group_size",
    "learning_rate",
)


def model_card(agent: TrainedAgent, name: str, adapter: bool) -> str:
    """Write a model card: how the policy was trained, how well it answers, and how to ask it."""
    what = "LoRA adapters of a search agent" if adapter else "A search agent"
    settings = {key: agent.model_settings[key] for key in _SHOWN if agent.model_settings.get(key) is not None}
    parts = [
        "---\nlibrary_name: transformers\ntags: [search-agent, calibadv]\npipeline_tag: text-generation\n---",
        f"# {name}",
        f"{what}, trained with calibadv {versions()['calibadv']}: it thinks, calls a search engine over several turns, "
        f"and answers. These are the weights after {agent.step} steps.",
        "## Use",
        f'```sh\ncalibadv ask --model {name} --index INDEX "Your question?"\n```',
        "Its language (prompt, tags, limits), as `calibadv.yaml` holds it:",
        _yaml(agent.model_settings.get("protocol")),
        "## Training",
        _yaml(settings),
        *_results(agent),
    ]
    return "\n\n".join(parts) + "\n"


def _results(agent: TrainedAgent) -> list[str]:
    rows = agent.run.read_results().get("validations", []) if agent.run else []
    rows = [row for row in rows if "f1" in row and row["step"] <= agent.step]
    if not rows:
        return []
    lines = ["| step | F1 | EM | valid | searches | questions |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['step']} | {row['f1']:.3f} | {row['em']:.3f} | {row['format_valid']:.3f} | {row['searches']:.2f} | "
        f"{row['count']:.0f} |"
        for row in rows
    ]
    return ["## Validation", "\n".join(lines)]


def _yaml(content: object) -> str:
    return f"```yaml\n{yaml.safe_dump(content, sort_keys=False).strip()}\n```"
