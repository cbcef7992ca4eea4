"""From a rollout batch to its advantages, in training and in replay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from calibadv.contracts import checked_advantages, checked_pair
from calibadv.interfaces import AdvantageEstimator, Calibrator, Metrics
from calibadv.types import RolloutBatch


def compute_advantages(
    batch: RolloutBatch, estimator: AdvantageEstimator, calibrators: Sequence[Calibrator]
) -> tuple[Tensor, Tensor, Metrics]:
    """Estimate advantages and apply calibrators in order; without any, this is plain GRPO.

    Args:
        batch: B rollouts, which ``estimator`` has prepared.
        estimator: turns rewards into advantages.
        calibrators: change them.

    Returns:
        [B, T] of the estimator; [B, T] after the calibrators; and the calibrators' metrics.

    Raises:
        UserError: a part returned what are no advantages.
    """
    estimated = calibrated = checked_advantages(estimator.estimate(batch), batch, estimator)
    metrics: Metrics = {}
    for calibrator in calibrators:
        calibrated, more = checked_pair(calibrator.calibrate(batch, calibrated), calibrator)
        calibrated = checked_advantages(calibrated, batch, calibrator)
        metrics.update(more)
    return estimated, calibrated, metrics
