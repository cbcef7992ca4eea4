"""Aggregation of per-token losses, with which a loss weighs tokens and rollouts: an option of every loss."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from calibadv.batch import LossInputs
from calibadv.errors import UserError

log = logging.getLogger(__name__)


class Aggregation(ABC):
    """Reduces per-token losses to a scalar, so that the parts of the micro-batches add up to the mini-batch's loss."""

    @abstractmethod
    def reduce(self, values: Tensor, inputs: LossInputs) -> Tensor:
        """Compute the part of the mini-batch's loss that this micro-batch contributes.

        Args:
            values: [N], one per trained token.
            inputs: the same N tokens.

        Returns:
            A scalar with the gradient of ``values``.
        """


class TokenMean(Aggregation):
    """Mean over the trained tokens of the mini-batch: every token weighs the same (DAPO, arXiv 2503.14476)."""

    @override
    def reduce(self, values: Tensor, inputs: LossInputs) -> Tensor:
        return values.sum() / inputs.denominator


class SequenceMean(Aggregation):
    """Mean over the tokens of each rollout, then over the rollouts: every rollout weighs the same (arXiv 2402.03300).

    Rollouts without advantage count as rollouts.
    """

    @override
    def reduce(self, values: Tensor, inputs: LossInputs) -> Tensor:
        lengths = torch.bincount(inputs.rollout_ids)[inputs.rollout_ids]
        return (values / lengths).sum() / inputs.num_rollouts


class FixedLength(Aggregation):
    """Sum over the tokens / (length x rollouts): the weight of a token depends on no sampled length (arXiv 2503.20783).

    It only sets the scale of the policy loss, against the clip of the gradient and against the other terms: the paper
    takes the most tokens that a rollout may have, so that the loss is smaller than the mean over tokens, by the mean
    length over this length.

    Args:
        length: Tokens that every rollout counts for, such as (max_searches + 1) x max_turn_tokens of the protocol.
    """

    def __init__(self, length: int) -> None:
        if length < 1:
            raise UserError(
                f"the length of FixedLength is {length}; it must be at least 1, such as the most tokens of a rollout"
            )
        self.length = length

    @override
    def reduce(self, values: Tensor, inputs: LossInputs) -> Tensor:
        return values.sum() / (self.length * inputs.num_rollouts)


def check_length(loss: object, longest: int) -> None:
    """Warn of a FixedLength that does not fit the protocol."""
    aggregation = getattr(loss, "aggregation", None)
    if isinstance(aggregation, FixedLength) and aggregation.length != longest:
        log.warning(
            "the length of FixedLength is %d, and the protocol lets a rollout have %d policy tokens; the paper takes "
            "the latter, and the scale of the policy loss depends on it",
            aggregation.length,
            longest,
        )
