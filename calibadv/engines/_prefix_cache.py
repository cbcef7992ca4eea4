"""The key-value cache of a transformers model: preallocated, and reused from turn to turn.

Between two turns a rollout only grows: its next prompt is its last one, the message and the observation. Its keys and
values stay valid as long as the weights do not change, so that the model reads only the new tokens.

Shapes: **N** rows that are decoded together, **W** columns of the cache, **L** layers, **H** key-value heads, **D**
width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from calibadv.types import DrawKey

# Columns by which a buffer grows: it is copied once in so many tokens.
_GROWTH = 64


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, in buffers with free columns for the next tokens."""

    _buffers: tuple[Tensor, ...] = ()

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*new)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._buffers or end > self._buffers[0].shape[-2]:
            old = self._buffers
            self._buffers = tuple(like.new_empty(*like.shape[:2], end + _GROWTH, like.shape[-1]) for like in new)
            for buffer, previous in zip(self._buffers, old, strict=False):  # there is none at first
                buffer[:, :, :start] = previous[:, :, :start]
        for buffer, tensor in zip(self._buffers, new, strict=True):
            buffer[:, :, start:end] = tensor
        return self._set_length(end)

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.get_seq_length()
        self._buffers = tuple(buffer[indices] for buffer in self._buffers)
        self._set_length(length)

    def select(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Copy the columns [N, C] of the rows [N]: keys and values [N, H, C, D]."""
        keys, values = (buffer[rows[:, None], :, columns].transpose(1, 2) for buffer in self._buffers)
        return keys, values

    def _set_length(self, length: int) -> tuple[Tensor, Tensor]:
        """Set the views that transformers reads to the first columns of the buffers."""
        keys, values = (buffer[:, :, :length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def make_cache(model: nn.Module) -> DynamicCache:
    """Make an empty cache for a model."""
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [PreallocatedLayer() for _ in cache.layers]  # type: ignore[no-untyped-call]
    return cache


@dataclass(frozen=True, slots=True)
class _CacheBlock:
    """Rows that were stored together, padded on the left."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values [rows, H, columns, D] of each layer
    turns: list[DrawKey]  # key of the turn of each row
    token_ids: list[tuple[int, ...]]  # tokens of each row that the model has read


@dataclass(frozen=True, slots=True)
class _RowCopy:
    """Rows of a block to copy, and the rows of the batch to copy them to."""

    block: _CacheBlock
    sources: list[int]
    targets: list[int]


class PrefixCache:
    """Keys and values of rows whose next turn may follow."""

    def __init__(self) -> None:
        self._blocks: list[_CacheBlock] = []

    def clear(self) -> None:
        """Drop all rows, as when the weights have changed."""
        self._blocks = []

    def store(
        self, cache: DynamicCache, mask: Tensor, rows: list[int], turns: list[DrawKey], token_ids: list[tuple[int, ...]]
    ) -> None:
        """Copy some rows out of the cache of a batch.

        Nothing is stored of a model with layers that drop tokens (sliding windows, recurrent states).
        """
        layers = [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]
        if not rows or len(layers) < len(cache.layers):
            return
        indices = torch.tensor(rows, device=mask.device)
        lengths = [len(tokens) for tokens in token_ids]
        mask = mask[indices]
        own = mask & (mask.cumsum(dim=1) <= torch.tensor(lengths, device=mask.device)[:, None])
        # A stable sort brings the tokens of each row to the right, in their order.
        columns = own.to(torch.uint8).argsort(dim=1, stable=True)[:, -max(lengths) :]
        self._blocks.append(_CacheBlock([layer.select(indices, columns) for layer in layers], turns, token_ids))

    def load(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], turns: Sequence[DrawKey]
    ) -> tuple[DynamicCache, list[int]]:
        """Make the cache of a new batch from the rows that are stored, and drop them all.

        A stored row is used for the next turn of its rollout, if that turn's prompt begins with the row's tokens.
        Returns the cache, and the number of tokens of each prompt in it.
        """
        cache = make_cache(model)
        cached = [0] * len(prompts)
        copies: list[_RowCopy] = []
        row_of = {replace(key, turn=key.turn - 1): row for row, key in enumerate(turns)}
        for block in self._blocks:
            copied = _RowCopy(block, [], [])
            for source, (turn, tokens) in enumerate(zip(block.turns, block.token_ids, strict=True)):
                row = row_of.get(turn)
                if row is not None and len(tokens) < len(prompts[row]) and tuple(prompts[row][: len(tokens)]) == tokens:
                    cached[row] = len(tokens)
                    copied.sources.append(source)
                    copied.targets.append(row)
            if copied.sources:
                copies.append(copied)
        self._blocks = []
        for layer in range(len(cache.layers) if copies else 0):
            cache.update(*_assemble(copies, layer, len(prompts), max(cached)), layer)
        return cache, cached


def _assemble(copies: list[_RowCopy], layer: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Keys and values [N, H, columns, D] of one layer; 0 where a row has no token, since a masked nan still counts."""
    keys, values = (
        like.new_zeros(rows, like.shape[1], columns, like.shape[3]) for like in copies[0].block.layers[layer]
    )
    for copied in copies:
        for batch, stored in zip((keys, values), copied.block.layers[layer], strict=True):
            width = min(columns, stored.shape[2])
            batch[copied.targets, :, columns - width :] = stored[copied.sources, :, stored.shape[2] - width :]
    return keys, values
