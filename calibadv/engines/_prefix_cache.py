"""The key-value cache of a transformers model: without a copy at every token, and kept from turn to turn.

Between two turns a rollout only grows: its next prompt is its last one, the message and the observation. Its keys and
values stay true as long as the weights do, so that only what is new needs to be read.

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

# Columns that a buffer grows by: it is copied once in so many tokens.
_ROOM = 64


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, in buffers with room for tokens to come."""

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
            self._buffers = tuple(some.new_empty(*some.shape[:2], end + _ROOM, some.shape[-1]) for some in new)
            for buffer, before in zip(self._buffers, old, strict=False):  # there is no old one at first
                buffer[:, :, :start] = before[:, :, :start]
        for buffer, some in zip(self._buffers, new, strict=True):
            buffer[:, :, start:end] = some
        return self._show(end)

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.get_seq_length()
        self._buffers = tuple(buffer[indices] for buffer in self._buffers)
        self._show(length)

    def select(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Copy some columns of some rows."""
        keys, values = (buffer[rows[:, None], :, columns].transpose(1, 2) for buffer in self._buffers)
        return keys, values

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        """Set what transformers looks at."""
        keys, values = (buffer[:, :, :length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def make_cache(model: nn.Module) -> DynamicCache:
    """Make an empty cache for a model."""
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [RoomyLayer() for _ in cache.layers]  # type: ignore[no-untyped-call]
    return cache


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows that left the batch together, padded on the left.

    ``layers`` holds keys and values [rows, H, columns, D] of each layer; ``turns`` and ``token_ids`` tell of each row
    which turn it was and what it had read.
    """

    layers: list[tuple[Tensor, Tensor]]
    turns: list[DrawKey]
    token_ids: list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Move:
    """Which rows of a block become which rows of a batch."""

    block: _Block
    sources: list[int]
    targets: list[int]


class KeptRows:
    """Keys and values of rows whose next turn may come."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    def clear(self) -> None:
        """Forget all rows, as when the weights have changed."""
        self._blocks = []

    def keep(
        self, cache: DynamicCache, mask: Tensor, rows: list[int], turns: list[DrawKey], token_ids: list[tuple[int, ...]]
    ) -> None:
        """Copy some rows out of the cache of a batch.

        A model with layers that forget tokens (sliding windows, recurrent states) keeps nothing.
        """
        roomy = [layer for layer in cache.layers if isinstance(layer, RoomyLayer)]
        if not rows or len(roomy) < len(cache.layers):
            return
        places = torch.tensor(rows, device=mask.device)
        lengths = [len(read) for read in token_ids]
        mask = mask[places]
        own = mask & (mask.cumsum(dim=1) <= torch.tensor(lengths, device=mask.device)[:, None])
        # A stable sort brings the tokens of each row to the right, in their order.
        columns = own.to(torch.uint8).argsort(dim=1, stable=True)[:, -max(lengths) :]
        layers = [layer.select(places, columns) for layer in roomy]
        self._blocks.append(_Block(layers, turns, token_ids))

    def take(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], turns: Sequence[DrawKey]
    ) -> tuple[DynamicCache, list[int]]:
        """Make the cache of a new batch from what is kept of its rows, and forget everything.

        A row goes on where the turn before is kept and its prompt begins with the tokens that were read.
        """
        cache = make_cache(model)
        held = [0] * len(prompts)
        moves: list[_Move] = []
        before = {replace(key, turn=key.turn - 1): row for row, key in enumerate(turns)}
        for block in self._blocks:
            move = _Move(block, [], [])
            for source, (turn, read) in enumerate(zip(block.turns, block.token_ids, strict=True)):
                row = before.get(turn)
                if row is not None and len(read) < len(prompts[row]) and tuple(prompts[row][: len(read)]) == read:
                    held[row] = len(read)
                    move.sources.append(source)
                    move.targets.append(row)
            if move.sources:
                moves.append(move)
        self._blocks = []
        for place in range(len(cache.layers) if moves else 0):
            cache.update(*_put_together(moves, place, len(prompts), max(held)), place)
        return cache, held


def _put_together(moves: list[_Move], place: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Keys and values [N, H, columns, D] of one layer; 0 where a row has no token, since a masked nan still counts."""
    keys, values = (
        like.new_zeros(rows, like.shape[1], columns, like.shape[3]) for like in moves[0].block.layers[place]
    )
    for move in moves:
        for whole, part in zip((keys, values), move.block.layers[place], strict=True):
            width = min(columns, part.shape[2])
            whole[move.targets, :, columns - width :] = part[move.sources, :, part.shape[2] - width :]
    return keys, values
