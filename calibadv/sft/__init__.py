"""Supervised fine-tuning on demonstrations: the warm start of a policy that does not speak the protocol yet."""

from calibadv.sft.data import DemonstrationData, Demonstrations
from calibadv.sft.module import SupervisedModule

__all__ = ["DemonstrationData", "Demonstrations", "SupervisedModule"]
