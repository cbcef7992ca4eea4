"""The policy: model and tokenizer together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibadv.distributed import full_tensor
from calibadv.policy.tokenizer import AgentTokenizer


@dataclass(frozen=True, slots=True)
class Policy:
    """A causal language model and its tokenizer."""

    model: nn.Module
    tokenizer: AgentTokenizer

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights as an engine with a copy of its own needs them: unsharded, and with the adapters merged in.

        The model itself is left alone: merging in place and taking back would round its weights at every update.
        Where parameters are sharded over processes, all processes must iterate together.
        """
        with torch.no_grad():
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                owner, within, _ = name.partition(".base_layer.weight")
                if ".lora_" in name:
                    continue
                value = parameter.detach()
                if within:
                    adapted: Any = self.model.get_submodule(owner)
                    value = value + adapted.get_delta_weight("default")
                yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), full_tensor(value)
