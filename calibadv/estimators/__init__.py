"""Advantage estimators, one per file."""

from calibadv.estimators.grpo import GRPO

__all__ = ["GRPO"]
