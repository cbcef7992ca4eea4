"""What the controls of CalibAdv and the simple rules beside it compute: they use no evidence, or destroy it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibadv.numerics.shapes import check_shapes


def mean_over(values: Tensor, places: Tensor) -> float:
    """The mean of some values.

    Args:
        values: [B, K].
        places: [B, K] bool, True at one place at least.

    Returns:
        Their mean, computed in float64.
    """
    check_shapes("B K, B K", values, places)
    return float(values[places].cpu().double().mean())


def shuffle(values: Sequence[float], draws: NDArray[np.float32]) -> list[float]:
    """Put values into an order that is drawn.

    Args:
        values: N of them.
        draws: [N] uniforms; equal ones keep the order of their values.

    Returns:
        The same values, those with the smallest draws first.
    """
    return [values[place] for place in np.argsort(draws, kind="stable")]


def sign_masses(advantages: Tensor) -> tuple[float, float]:
    """P and N: the sum of the positive advantages of all tokens, and that of the absolute negative ones.

    Args:
        advantages: [B, T].

    Returns:
        Both, computed in float64.
    """
    values = advantages[advantages != 0].cpu().double()
    return float(values.clamp(min=0).sum()), float(-values.clamp(max=0).sum())


def scale_by_sign(advantages: Tensor, positive_weight: float, negative_weight: float) -> Tensor:
    """A+ x positive_weight, A- x negative_weight (W-REINFORCE, arXiv 2506.01347).

    Args:
        advantages: [B, T].
        positive_weight: factor of positive advantages.
        negative_weight: factor of negative ones.

    Returns:
        [B, T].
    """
    return torch.where(advantages > 0, advantages * positive_weight, advantages * negative_weight)


def matching_negative_weight(advantages: Tensor, target: Tensor, positive_weight: float) -> float | None:
    """The factor of negative advantages that gives them the P/N of other advantages, over all tokens.

    Args:
        advantages: [B, T] to be scaled.
        target: [B, T] whose P/N they shall get.
        positive_weight: factor of the positive ones of ``advantages``.

    Returns:
        positive_weight x P x N_target / (N x P_target); None where P, N or P_target is 0, which no factor can match.
    """
    check_shapes("B T, B T", advantages, target)
    positive, negative = sign_masses(advantages)
    target_positive, target_negative = sign_masses(target)
    if not (positive and negative and target_positive):
        return None
    return positive_weight * positive * target_negative / (negative * target_positive)


def negative_floor(advantages: Tensor, bound: float) -> float | None:
    """-bound x the mean of the positive advantages over their tokens.

    Args:
        advantages: [B, T].
        bound: times the mean.

    Returns:
        A number below 0; None without a positive advantage.
    """
    positive = advantages[advantages > 0].cpu().double()
    return -bound * float(positive.mean()) if len(positive) else None
