"""Shared by SoftPenalty and its controls: the turns with a negative advantage, and the soft penalty on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibadv.batch import RolloutBatch
from calibadv.numerics.credit import negative_tokens, scale_negative_turns
from calibadv.types import Metrics


@dataclass(frozen=True, slots=True)
class NegativeTurns:
    """The tokens and search turns of a batch with a negative advantage."""

    tokens: Tensor  # [N] indices in the flattened [B, T], those of answer turns included
    turns: Tensor  # [N] indices of their turns in the flattened [B, K]
    searches: Tensor  # [B, K] bool, True at search turns among them whose tools find documents


def find_negative_turns(batch: RolloutBatch, advantages: Tensor) -> NegativeTurns:
    """Find the turns with a token whose advantage is negative."""
    num_turns = batch.step_correctness.shape[1]
    tokens, turns = negative_tokens(advantages, batch.turn_ids, num_turns)
    is_negative = torch.bincount(turns, minlength=batch.step_correctness.numel()).view(-1, num_turns) > 0
    return NegativeTurns(tokens, turns, is_negative & batch.finds_documents)


def apply_soft_penalty(advantages: Tensor, correctness: Tensor, negative: NegativeTurns) -> tuple[Tensor, Metrics]:
    """Multiply the negative advantages by (1 - correctness of the turn), which is 0 at answer turns."""
    scaled = scale_negative_turns(advantages, correctness, negative.tokens, negative.turns)
    count = int(negative.searches.sum())
    if count == 0:
        return scaled, {}
    return scaled, {"credit/softened": int((negative.searches & (correctness > 0)).sum()) / count}
