"""Rollouts of four turns with observations of 200 tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.rollout import Draws, run_rollouts
from calibadv.agent.tools import SearchTool
from calibadv.engines import TransformersEngine
from calibadv.policy.loading import load_policy
from calibadv.policy.policy import Policy
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.protocol.search import SearchProtocol
from calibadv.retrieval import MemoryRetriever
from calibadv.types import Completion, Document, DrawKey, Question, Rollout, Sampling

_QUESTIONS, _SAMPLES, _TOKENS, _OBSERVATION = 8, 8, 64, 200
_SEARCH = "<think> so </think> <search> it </search>"


class Searching(AgentTokenizer):
    """Shows every 24th token as a search, so that the messages of a random model have 24 tokens on average."""

    def may_stop(self, token_id: int) -> bool:
        """Whether it is one of these."""
        return token_id % 24 == 0

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, of which only the end matters."""
        return _SEARCH if any(self.may_stop(token_id) for token_id in token_ids) else "so"


class PrefillingEngine(TransformersEngine):
    """Reads every prompt from its beginning at every turn."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]
    ) -> list[Completion]:
        """Forget the turn before, and sample."""
        self.release()
        return super().generate(prompts, sampling, keys)


def compare_turns(folder: Path, episodes: int) -> dict[str, list[float]]:
    """Sample the same batches of rollouts with either engine, in turn: seconds of each."""
    policy = load_policy(str(folder))
    policy = Policy(policy.model, Searching(policy.tokenizer.backend))
    retriever = MemoryRetriever([_document(policy.tokenizer)], {"it": ["d"]}, top_k=1)
    protocol = SearchProtocol(False, "short", "never", max_searches=3, max_turn_tokens=_TOKENS)
    agents = {}
    for name, engine in (("prefilled", PrefillingEngine()), ("cache kept", TransformersEngine())):
        engine.sync(policy)
        agents[name] = Agent(engine, Environment([SearchTool(retriever)]), protocol, policy.tokenizer)
    questions = [Question(str(place), f"what is {place}?", ["none"]) for place in range(_QUESTIONS)]
    seconds: dict[str, list[float]] = {name: [] for name in agents}
    for step in range(episodes + 1):
        found: list[list[Rollout]] = []
        for name in list(agents)[:: 1 if step % 2 else -1]:
            start = time.perf_counter()
            found.append(run_rollouts(questions, agents[name], Draws(0, step, _SAMPLES, 1.0)))
            if step:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
        assert max(rollout.num_searches for rollout in found[0]) == 3
    return seconds


def _document(tokenizer: AgentTokenizer) -> Document:
    """A document that makes an observation of 200 tokens."""
    rng = random.Random(0)
    text = ""
    while len(tokenizer.encode(f"\n\n<information>Doc 1(Title: d) {text}</information>\n\n")) < _OBSERVATION:
        text += rng.choice("abcdefgh") + " "
    return Document("d", "d", text)
