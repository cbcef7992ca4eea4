"""Sizes of a model, counted without loading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from calibadv.errors import UserError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a causal language model."""

    parameters: int  # all of them, tied ones once
    layer_parameters: int  # those of one layer
    layers: int
    hidden: int  # width of the states between layers
    query_width: int  # attention heads x width of a head
    kv_width: int  # key-value heads x width of a head
    intermediate: int  # width of the feed-forward part
    vocabulary: int  # rows of the output layer

    @property
    def head_parameters(self) -> int:
        """Parameters of the output layer."""
        return self.vocabulary * self.hidden

    @property
    def body_parameters(self) -> int:
        """Parameters of the layers: every token is multiplied with them, while an embedding is only looked up."""
        return self.layers * self.layer_parameters

    @property
    def outer_parameters(self) -> int:
        """Parameters outside of the layers: embeddings, and the output layer if it is not tied to them."""
        return self.parameters - self.body_parameters


def empty_model(config: Any) -> nn.Module:
    """Build a model on the meta device, which holds no weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def read_shape(model: nn.Module) -> ModelShape:
    """Count a model's parameters and read its widths."""
    config: Any = model.config
    config = config.get_text_config()
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    stack = next((layers for layers in lists if len(layers) == config.num_hidden_layers), None)
    if stack is None:
        raise UserError(
            f"{type(model).__name__} has no list of {config.num_hidden_layers} layers, by which memory is estimated; "
            "measure a step of it with: python -m tools.bench.step.bench"
        )
    heads = config.num_attention_heads
    head_width = _either(config, "head_dim", config.hidden_size // heads)
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_parameters=sum(parameter.numel() for parameter in stack.parameters()) // len(stack),
        layers=len(stack),
        hidden=config.hidden_size,
        query_width=heads * head_width,
        kv_width=_either(config, "num_key_value_heads", heads) * head_width,
        intermediate=_either(config, "intermediate_size", 4 * config.hidden_size),
        vocabulary=config.vocab_size,
    )


def _either(config: Any, name: str, default: int) -> int:
    """A setting that some configs lack and others leave as None."""
    return getattr(config, name, None) or default
