"""The search agent: its environment and tools, episodes, and the multi-turn loop."""

from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.rollout import Draws, run_rollouts
from calibadv.agent.tools import SearchTool

__all__ = ["Agent", "Draws", "Environment", "SearchTool", "run_rollouts"]
