"""The sizes of a model that memory and time depend on, counted without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from calibadv.errors import UserError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a causal language model.

    Attributes:
        parameters: all of them, tied ones once.
        layer_parameters: those of one layer.
        layers: number of layers.
        hidden: width of the states between layers.
        query_width: attention heads x width of a head.
        kv_width: key-value heads x width of a head.
        intermediate: width of the feed-forward part.
        vocabulary: rows of the output layer.
    """

    parameters: int
    layer_parameters: int
    layers: int
    hidden: int
    query_width: int
    kv_width: int
    intermediate: int
    vocabulary: int

    @property
    def head_parameters(self) -> int:
        """Those of the output layer."""
        return self.vocabulary * self.hidden

    @property
    def body_parameters(self) -> int:
        """Those that every token is multiplied with before the output layer; an embedding is only looked up."""
        return self.layers * self.layer_parameters

    @property
    def outer_parameters(self) -> int:
        """Those outside of the layers: embeddings, and the output layer where it is not tied to them."""
        return self.parameters - self.body_parameters


def empty_model(config: Any) -> nn.Module:
    """Build a model without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def shape_of(model: nn.Module) -> ModelShape:
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
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_parameters=sum(parameter.numel() for parameter in stack.parameters()) // len(stack),
        layers=len(stack),
        hidden=config.hidden_size,
        query_width=heads * head_width,
        kv_width=kv_heads * head_width,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
    )
