"""Advantage estimators, one per file."""

from calibadv.estimators.dr_grpo import DrGRPO
from calibadv.estimators.gigpo import GiGPO
from calibadv.estimators.grpo import GRPO
from calibadv.estimators.igpo import IGPO
from calibadv.estimators.mt_grpo import MTGRPO
from calibadv.estimators.rloo import RLOO

__all__ = ["GRPO", "IGPO", "MTGRPO", "RLOO", "DrGRPO", "GiGPO"]
