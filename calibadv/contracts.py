"""What parts return, held against the contracts of ``interfaces.py``: a part that breaks one is refused by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibadv.errors import UserError
from calibadv.interfaces import AdvantageEstimator, Calibrator, GroupFilter, Metrics, PolicyLoss, Regularizer, Reward
from calibadv.types import RolloutBatch

_LONGEST = 80


def is_number(value: Any) -> bool:
    """Whether something is a real number: Python's or numpy's, truth values included; a tensor is none.

    Args:
        value: anything.

    Returns:
        False for whatever else.
    """
    return isinstance(value, (int, float, np.integer, np.floating, np.bool_))


def shown(value: Any) -> str:
    """Show what a part returned in a message.

    Args:
        value: anything.

    Returns:
        One line that is not long.
    """
    text = str(value) if is_number(value) else f"{type(value).__name__} {value!r}"
    text = "None" if value is None else " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def checked_advantages(advantages: Any, batch: RolloutBatch, part: AdvantageEstimator | Calibrator) -> Tensor:
    """See that a part returned advantages.

    Args:
        advantages: what it returned.
        batch: B rollouts that it was given.
        part: for the message.

    Returns:
        The same, [B, T].

    Raises:
        UserError: it is no tensor, has another shape, or a number that is not finite or belongs to no trained token.
    """
    name, mask = type(part).__name__, batch.loss_mask
    if not isinstance(advantages, Tensor):
        raise UserError(f"{name} returned {shown(advantages)}; advantages are a tensor [B, T]")
    if advantages.shape != mask.shape:
        raise UserError(
            f"{name} returned advantages of shape {list(advantages.shape)}; they are [B, T], here {list(mask.shape)}"
        )
    if not advantages.isfinite().all():
        row = int((~advantages.isfinite()).any(dim=1).nonzero()[0])
        question = batch.rollouts[row].question.id
        worst = advantages[row][~advantages[row].isfinite()][0].item()
        raise UserError(f"{name} returned an advantage of {worst} for question '{question}'; all must be finite")
    outside = int(torch.where(mask, 0, advantages).count_nonzero())
    if outside:
        raise UserError(
            f"{name} returned advantages other than 0 for {outside} tokens outside of batch.loss_mask; multiply by it"
        )
    return advantages


def checked_pair(returned: Any, part: Calibrator | PolicyLoss | Regularizer) -> tuple[Any, Metrics]:
    """See that a part returned something and metrics.

    Args:
        returned: what it returned.
        part: for the message.

    Returns:
        The same.

    Raises:
        UserError: it is no pair, or the second is no dictionary of numbers.
    """
    name = type(part).__name__
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        raise UserError(f"{name} returned {shown(returned)}; it returns a tensor and a dictionary of metrics")
    for metric, value in returned[1].items():
        if not is_number(value):
            raise UserError(f"{name} reported {shown(value)} as '{metric}'; a metric is a number, as of .item()")
    return returned


def checked_term(returned: Any, part: PolicyLoss | Regularizer) -> tuple[Tensor, Metrics]:
    """See that a part returned a term of the loss, and metrics.

    Args:
        returned: what it returned.
        part: for the message.

    Returns:
        The same.

    Raises:
        UserError: the first is no scalar tensor, or the second no dictionary of numbers.
    """
    term, metrics = checked_pair(returned, part)
    if not (isinstance(term, Tensor) and term.dim() == 0):
        what = f"a tensor of shape {list(term.shape)}" if isinstance(term, Tensor) else shown(term)
        raise UserError(f"{type(part).__name__} returned {what} as its term of the loss, which is a scalar tensor")
    return term, metrics


def checked_verdict(verdict: Any, group_filter: GroupFilter, question_id: str) -> bool:
    """See that a filter said yes or no.

    Args:
        verdict: what it returned.
        group_filter: for the message.
        question_id: of the group.

    Returns:
        The same.

    Raises:
        UserError: it is no truth value.
    """
    if not isinstance(verdict, (bool, np.bool_)):
        raise UserError(
            f"{type(group_filter).__name__} returned {shown(verdict)} for the group of question '{question_id}'; "
            "keep returns True or False"
        )
    return bool(verdict)


def checked_score(score: Any, reward: Reward, question_id: str) -> float:
    """See that a reward scored an answer.

    Args:
        score: what it returned.
        reward: for the message.
        question_id: of the answer.

    Returns:
        The same.

    Raises:
        UserError: it is no number in [0, 1].
    """
    if not (is_number(score) and 0 <= score <= 1):
        raise UserError(
            f"{type(reward).__name__} scored {shown(score)} on question '{question_id}'; a reward lies in [0, 1]"
        )
    return float(score)
