"""Policy losses, one per file, and how they weigh tokens and rollouts."""

from calibadv.losses.aggregation import Aggregation, FixedLength, SequenceMean, TokenMean
from calibadv.losses.cispo import CISPO
from calibadv.losses.gspo import GSPO
from calibadv.losses.ppo_clip import PPOClip

__all__ = ["CISPO", "GSPO", "Aggregation", "FixedLength", "PPOClip", "SequenceMean", "TokenMean"]
