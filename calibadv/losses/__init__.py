"""Policy losses, one per file."""

from calibadv.losses.ppo_clip import PPOClip

__all__ = ["PPOClip"]
