"""The language of agent and environment: prompts, tags and token ids."""

from calibadv.protocol.search import SearchProtocol
from calibadv.protocol.tokenizer import AgentTokenizer

__all__ = ["AgentTokenizer", "SearchProtocol"]
