"""One question to an agent, as a stream of what it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from calibadv.agent.episode import Agent, Episode, append_message, append_observations, new_episode, to_rollout
from calibadv.agent.rollout import check_engine, check_prompt
from calibadv.engines import TransformersEngine
from calibadv.errors import ToolError
from calibadv.policy.policy import Policy
from calibadv.runs.rollouts import rollout_to_json
from calibadv.types import Completion, DrawKey, Question, Sampling, StopReason

EventKind = Literal["think", "search", "documents", "answer", "end"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that the agent has done.

    Attributes:
        kind: what it is. A think comes in pieces, the others whole; ``end`` is the last one.
        text: the next piece of a think, a query, the answer, or how the rollout ended.
        content: JSON of it: documents of ``documents``, the rollout of ``end``.
    """

    kind: EventKind
    text: str = ""
    content: Any = None

    def as_json(self) -> dict[str, Any]:
        """The event as an object of JSON."""
        return {"kind": self.kind, "text": self.text, "content": self.content}


class Session:
    """Answers questions greedily, one at a time.

    Args:
        agent: whose engine decodes token by token.
        policy: model and tokenizer.

    Raises:
        UserError: the protocol allows longer rollouts than the engine.
    """

    def __init__(self, agent: Agent, policy: Policy) -> None:
        check_engine(agent)
        assert isinstance(agent.engine, TransformersEngine), "others give whole messages only"
        self._agent = agent
        self._engine = agent.engine
        self._engine.sync(policy)
        self._asked = 0

    def ask(self, question: str) -> Iterator[Event]:
        """Answer a question.

        Args:
            question: its text.

        Yields:
            What the agent does, as it does it.

        Raises:
            UserError: the prompt leaves no room for a message.
            RetrievalError: a search failed.
        """
        agent = self._agent
        self._asked += 1
        asked = Question(f"asked {self._asked}", question, [])
        episode = new_episode(asked, 0, check_prompt(asked, agent), agent)
        while episode.status is None:
            yield from self._message(episode)
            message = episode.messages[-1]
            for call in message.calls:
                yield Event("search", " ".join(map(str, call.arguments.values())))
            if episode.status is None:
                [outcome] = agent.environment.step([episode.calls])
                if isinstance(outcome, ToolError):
                    raise outcome
                append_observations([episode], [outcome], agent)
                if episode.segments[-1].source == "environment":
                    yield Event("documents", content=[asdict(d) for d in episode.segments[-1].documents or ()])
        rollout = to_rollout(episode, 0, agent.protocol)
        answer = episode.messages[-1].answer
        if answer is not None:
            yield Event("answer", answer)
        yield Event("end", str(rollout.status), rollout_to_json(rollout))

    def _message(self, episode: Episode) -> Iterator[Event]:
        """Decode the next message of an episode, and yield its think in pieces."""
        agent = self._agent
        sampling = Sampling(0.0, agent.protocol.max_turn_tokens)
        key = DrawKey(0, 0, episode.question.id, 0, len(episode.messages))
        token_ids: list[int] = []
        said = ""
        for token in self._engine.stream(episode.token_ids, sampling, key):
            token_ids.append(token)
            think = agent.protocol.parse(agent.tokenizer.decode(token_ids)).think
            if think.startswith(said) and "\ufffd" not in think[len(said) :] and "<" not in think[len(said) :]:
                yield Event("think", think[len(said) :])
                said = think
        append_message(episode, Completion(tuple(token_ids), (0.0,) * len(token_ids), StopReason.TAG), agent)
