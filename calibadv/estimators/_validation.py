"""Checks that the estimators share."""

from __future__ import annotations

import math

from calibadv.errors import UserError


def check_weight(name: str, value: float) -> None:
    """See that a weight is one."""
    if not (value >= 0 and math.isfinite(value)):
        raise UserError(f"{name} is {value}; it must be a number of at least 0 (1.0 weighs both parts alike)")


def check_gamma(gamma: float) -> None:
    """See that a discount is one."""
    if not 0 < gamma <= 1:
        raise UserError(f"gamma is {gamma}; it must be above 0 and at most 1 (1.0 does not discount)")
