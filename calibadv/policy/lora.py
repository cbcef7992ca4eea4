"""Low-rank adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from calibadv.errors import UserError


@dataclass
class Lora:
    """Low-rank adapters in the place of full fine-tuning; the reference is then the policy without them."""

    rank: int = 16
    """Rank of the adapters."""
    alpha: int = 32
    """Scale: adapters are multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules to adapt, or ``all-linear``."""

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise UserError(f"model.lora.{name} is {getattr(self, name)}; it must be at least 1")


@contextmanager
def same_for_every_seed() -> Iterator[None]:
    """Draw new parameters alike for every seed of a run, since all start from one policy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def with_adapters(model: Any, lora: Lora) -> Any:
    """Put adapters on a model, the same ones for every seed of a run."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    try:
        with same_for_every_seed(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)  # we refuse these
            adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.lora.target_modules is {lora.target_modules}; name modules to adapt ({reason})"
        ) from error
    if model.config.get_text_config().tie_word_embeddings and any(
        isinstance(layer, BaseTunerLayer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    ):
        raise UserError(
            f"model.lora.target_modules is {lora.target_modules}, and the policy ties its output layer to its "
            "embedding: an adapter of one would untie them; leave both out"
        )
    return adapted
