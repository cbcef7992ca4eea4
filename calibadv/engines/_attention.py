"""Attention while decoding, where each row has one new token.

In models with fewer key-value heads than query heads, transformers copies keys and values for every query head before
it calls PyTorch's attention with a mask: at every token it writes the whole cache several times. With one query per
head, the queries that share a key-value head can be laid out as if they were a sequence, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "calibadv_grouped"


@contextmanager
def grouped_attention(model: nn.Module) -> Iterator[None]:
    """Let a model decode with grouped queries, if its attention is PyTorch's."""
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: query [N, heads, Q, D], keys and values [N, H, W, D], mask [N, 1, Q, W]."""
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    if length > 1 or groups == heads or not one_mask or settings.get("position_bias") is not None:
        output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **settings
        )
        return output
    grouped = query.reshape(rows, groups, heads // groups, width)
    attended = scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=settings.get("scaling"), dropout_p=0.0
    )
    return attended.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
