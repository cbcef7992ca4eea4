"""The language of agent and environment: prompts, messages and observations."""

from calibadv.protocol.search import SearchProtocol

__all__ = ["SearchProtocol"]
