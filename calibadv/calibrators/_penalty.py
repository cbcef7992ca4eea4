"""What SoftPenalty and its controls share: which searches are punished, and softening them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibadv.batch import RolloutBatch
from calibadv.numerics.credit import punished_tokens, soften
from calibadv.types import Metrics


@dataclass(frozen=True, slots=True)
class Punished:
    """The tokens and search turns of a batch with a negative advantage.

    Attributes:
        places: [N] tokens in the flattened [B, T], those of answer turns included.
        turns: [N] their turns in the flattened [B, K].
        searches: [B, K] bool, True at search turns among them whose tools find documents.
    """

    places: Tensor
    turns: Tensor
    searches: Tensor


def find_punished(batch: RolloutBatch, advantages: Tensor) -> Punished:
    """Find what has a negative advantage."""
    num_turns = batch.step_correctness.shape[1]
    places, turns = punished_tokens(advantages, batch.turn_ids, num_turns)
    punished = torch.bincount(turns, minlength=batch.step_correctness.numel()).view(-1, num_turns) > 0
    return Punished(places, turns, punished & batch.finds_documents)


def soften_searches(advantages: Tensor, correctness: Tensor, punished: Punished) -> tuple[Tensor, Metrics]:
    """Multiply the advantages of punished searches by (1 - correctness)."""
    softened = soften(advantages, correctness, punished.places, punished.turns)
    count = int(punished.searches.sum())
    if count == 0:
        return softened, {}
    return softened, {"credit/softened": int((punished.searches & (correctness > 0)).sum()) / count}
