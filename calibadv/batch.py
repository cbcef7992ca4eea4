"""Records of tensors, and the way from rollouts to them and back to one number per turn.

A rollout with the prompt ``P0 P1``, a search ``A0 A1``, its observation ``E0`` and the answer ``B0``, beside a shorter
one, becomes::

    token_ids        P0 P1 A0 A1 E0 B0      attention_mask    1  1  1  1  1  1
    turn_ids         -1 -1  0  0 -1  1      loss_mask         0  0  1  1  0  1
    sampled_logprobs  0  0 a0 a1  0 b0      answer_turn       1

The shorter one is padded on the right with token 0, attention 0 and turn -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibadv.numerics.masked import turn_means
from calibadv.types import Rollout


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """B rollouts as tensors, padded on the right. Frozen: a stage that changes one makes another.

    Attributes:
        rollouts: the B records behind the tensors.
        token_ids: [B, T] prompt, policy and environment tokens as sampled and shown; 0 where padded.
        attention_mask: [B, T] bool, False where padded.
        loss_mask: [B, T] bool, True at the policy tokens of included rollouts: the tokens that are trained.
        turn_ids: [B, T] turn of each policy token, -1 at prompt, environment and padding.
        answer_turn: [B] index of the answer turn.
        group_ids: [B] group of each rollout, numbered from 0 in order of first appearance.
        rewards: [B] score, gated by validity.
        included: [B] bool, False for rollouts that are left out of training and of the group statistics.
        step_correctness: [B, K] share of silver documents that each search turn newly found; 0 elsewhere.
        finds_documents: [B, K] bool, True at search turns whose tools find documents: only these can be correct.
        sampled_logprobs: [B, T] log-probabilities of the engine at policy tokens, 0 elsewhere.
        extras: what the advantage estimator has computed for itself, by its own names.
    """

    rollouts: tuple[Rollout, ...]
    token_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    turn_ids: Tensor
    answer_turn: Tensor
    group_ids: Tensor
    rewards: Tensor
    included: Tensor
    step_correctness: Tensor
    finds_documents: Tensor
    sampled_logprobs: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The result of a training step, for callbacks.

    Attributes:
        step: the rollout step, from 1.
        batch: its B rollouts.
        estimated: [B, T] advantages of the estimator.
        calibrated: [B, T] advantages after the calibrators.
        metrics: all curves of this step.
        seconds: wall time of each stage.
    """

    step: int
    batch: RolloutBatch
    estimated: Tensor
    calibrated: Tensor
    metrics: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """N trained tokens of one micro-batch, flattened: what a loss or a regularizer may look at.

    A rollout is never split over micro-batches: all its trained tokens are here, or none.

    Attributes:
        logprobs: [N] of the policy now, with gradient.
        old_logprobs: [N] of the policy before the first update on this rollout batch.
        reference_logprobs: [N] of the reference, None unless the KL coefficient is set.
        advantages: [N] after calibration.
        denominator: trained tokens of the whole mini-batch over all processes; sums are divided by it, so that neither
            the size of a micro-batch nor the number of processes changes the result.
        rollout_ids: [N] row of each token's rollout in the rollout batch: equal for the tokens of one rollout.
        turn_ids: [N] turn of each token within its rollout, from 0.
        num_rollouts: rollouts with a trained token in the whole mini-batch over all processes; for means over rollouts.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor | None
    advantages: Tensor
    denominator: float
    rollout_ids: Tensor
    turn_ids: Tensor
    num_rollouts: int


class EvaluationOutput:
    """Scored rollouts, one per question. No dataclass: Lightning takes those apart, and refuses frozen ones within."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self.rollouts = list(rollouts)


def group_rollouts(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Rows of each group, in order of first appearance: the rollouts of one question in one step.

    Args:
        rollouts: B rollouts, in any order.

    Returns:
        One list of row numbers per group; together they are a permutation of ``range(B)``.
    """
    order = {key: place for place, key in reversed(list(enumerate((r.step, r.question.id) for r in rollouts)))}
    rows = sorted(range(len(rollouts)), key=lambda row: order[rollouts[row].step, rollouts[row].question.id])
    return [list(group) for _, group in groupby(rows, lambda row: (rollouts[row].step, rollouts[row].question.id))]


def collate(rollouts: Sequence[Rollout]) -> RolloutBatch:
    """Pack rollouts into tensors.

    Rollouts read from a file have no token ids: theirs are 0, the counts of tokens are kept. A group that lost members
    to failed searches and has fewer than two left is left out whole.

    Args:
        rollouts: B scored and credited rollouts, at least one.

    Returns:
        A batch on the CPU, its rows in the order of ``rollouts``.
    """
    groups = group_rollouts(rollouts)
    lengths = np.array([_num_tokens(rollout) for rollout in rollouts])
    shape = (len(rollouts), int(lengths.max()))
    token_ids, turn_ids = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    logprobs = np.zeros(shape, dtype=np.float32)
    for row, rollout in enumerate(rollouts):
        _fill_row(rollout, token_ids[row], turn_ids[row], logprobs[row])
    group_ids = np.zeros(len(rollouts), dtype=np.int64)
    for number, rows in enumerate(groups):
        group_ids[rows] = number
    included = _included(rollouts, groups)
    answer_turn = np.array([len(rollout.policy_segments) - 1 for rollout in rollouts])
    num_turns = int(answer_turn.max()) + 1
    finds = [[found is not None for found in rollout.turn_documents] for rollout in rollouts]
    return RolloutBatch(
        rollouts=tuple(rollouts),
        token_ids=torch.from_numpy(token_ids),
        attention_mask=torch.from_numpy(np.arange(shape[1]) < lengths[:, None]),
        loss_mask=torch.from_numpy((turn_ids >= 0) & included[:, None]),
        turn_ids=torch.from_numpy(turn_ids),
        answer_turn=torch.from_numpy(answer_turn),
        group_ids=torch.from_numpy(group_ids),
        rewards=torch.tensor([rollout.score for rollout in rollouts], dtype=torch.float32),
        included=torch.from_numpy(included),
        step_correctness=_per_turn([rollout.step_correctness for rollout in rollouts], num_turns, torch.float32),
        finds_documents=_per_turn(finds, num_turns, torch.bool),
        sampled_logprobs=torch.from_numpy(logprobs),
    )


def _num_tokens(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + sum(segment.num_tokens for segment in rollout.segments)


def _fill_row(
    rollout: Rollout, token_ids: NDArray[np.int64], turn_ids: NDArray[np.int64], logprobs: NDArray[np.float32]
) -> None:
    position = len(rollout.prompt_ids)
    token_ids[:position] = rollout.prompt_ids
    turn = -1
    for segment in rollout.segments:
        place = slice(position, position + segment.num_tokens)
        position = place.stop
        assert len(segment.token_ids) in (0, segment.num_tokens), "num_tokens counts token_ids"
        if segment.token_ids:
            token_ids[place] = segment.token_ids
        if segment.source == "policy":
            turn += 1
            turn_ids[place] = turn
            assert len(segment.logprobs) in (0, segment.num_tokens), "one log-probability per token"
            if segment.logprobs:
                logprobs[place] = segment.logprobs


def _included(rollouts: Sequence[Rollout], groups: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    included = np.zeros(len(rollouts), dtype=np.bool_)
    for rows in groups:
        left = [row for row in rows if rollouts[row].included]
        if len(left) >= min(2, len(rows)):
            included[left] = True
    return included


def _per_turn(values: Sequence[Sequence[float | None]], num_turns: int, dtype: torch.dtype) -> Tensor:
    """[B, K], 0 where a rollout has no value."""
    padded = [[value or 0 for value in row] + [0] * (num_turns - len(row)) for row in values]
    return torch.tensor(padded, dtype=dtype)


def answer_mask(batch: RolloutBatch) -> Tensor:
    """The trained tokens of the answer turns: [B, T] bool."""
    return batch.loss_mask & (batch.turn_ids == batch.answer_turn[:, None])


def turn_values(batch: RolloutBatch, per_token: Tensor) -> list[list[float] | None]:
    """One number per policy segment: the mean over its tokens.

    Args:
        batch: B rollouts.
        per_token: [B, T], such as advantages.

    Returns:
        B lists, 0.0 for a segment without tokens; None for a rollout that is not included.
    """
    means = turn_means(per_token, batch.turn_ids, batch.step_correctness.shape[1]).tolist()
    turns, included = batch.answer_turn.tolist(), batch.included.tolist()
    return [
        row[: last + 1] if is_included else None for row, last, is_included in zip(means, turns, included, strict=True)
    ]


def to_device(batch: RolloutBatch, device: torch.device) -> RolloutBatch:
    """Return the same batch with its tensors on another device."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(batch, **tensors, extras={name: value.to(device) for name, value in batch.extras.items()})
