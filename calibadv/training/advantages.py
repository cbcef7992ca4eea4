"""From a rollout batch to its advantages, in training and in replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calibadv.batch import RolloutBatch
from calibadv.errors import UserError, is_number, shown
from calibadv.interfaces import AdvantageEstimator, Calibrator, PolicyLoss, Regularizer
from calibadv.types import Metrics


def compute_advantages(
    batch: RolloutBatch, estimator: AdvantageEstimator, calibrators: Sequence[Calibrator]
) -> tuple[Tensor, Tensor, Metrics]:
    """Estimate advantages and apply calibrators in order; without any, this is plain GRPO."""
    estimated = calibrated = checked_advantages(estimator.estimate(batch), batch, estimator)
    metrics: Metrics = {}
    metrics |= estimator.metrics(batch)
    for calibrator in calibrators:
        calibrated, more = checked_pair(calibrator.calibrate(batch, calibrated), calibrator)
        calibrated = checked_advantages(calibrated, batch, calibrator)
        metrics.update(more)
    return estimated, calibrated, metrics


def checked_advantages(advantages: Any, batch: RolloutBatch, part: AdvantageEstimator | Calibrator) -> Tensor:
    """See that a part returned advantages."""
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
    """See that a part returned something and metrics."""
    name = type(part).__name__
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        raise UserError(f"{name} returned {shown(returned)}; it returns a tensor and a dictionary of metrics")
    for metric, value in returned[1].items():
        if not is_number(value):
            raise UserError(f"{name} reported {shown(value)} as '{metric}'; a metric is a number, as of .item()")
    return returned
