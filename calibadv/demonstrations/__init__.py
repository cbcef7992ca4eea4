"""Demonstrations for a warm start: written by a script that searches, or chosen among rollouts."""

from calibadv.demonstrations.play import Script, play
from calibadv.demonstrations.scripted import Style, search_script

__all__ = ["Script", "Style", "play", "search_script"]
