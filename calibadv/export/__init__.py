"""A trained agent out of its run: as a Hugging Face folder, or to be used at once."""

from calibadv.export.agent import TrainedAgent, load_agent
from calibadv.export.folder import export

__all__ = ["TrainedAgent", "export", "load_agent"]
