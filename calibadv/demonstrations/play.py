"""An episode in which a script takes the place of the policy."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from calibadv.interfaces import Protocol
from calibadv.types import Document, Question, Rollout, RolloutStatus, Segment, ToolResult

Script = Generator[str, Sequence[Document], None]
"""Yields the messages of a policy, and is sent the documents that each search found."""

Search = Callable[[str], Sequence[Document]]
"""Finds the documents of one query, as an episode shows them."""


def play(script: Script, question: Question, search: Search, protocol: Protocol, sample: int = 0) -> Rollout:
    """Let a script talk with the environment, and return the episode as a rollout, without token ids.

    Args:
        script: writes the messages; a message without a search is its last.
        question: what is asked.
        search: finds the documents of a query.
        protocol: the language of both.
        sample: number of the rollout among those of the question.

    Returns:
        A rollout whose status follows from its text.
    """
    segments: list[Segment] = []
    message = next(script)
    while True:
        segments.append(Segment("policy", message, num_tokens=0))
        parsed = protocol.parse(message)
        if not parsed.calls:
            break
        documents = tuple(search(parsed.calls[0].arguments["query"]))
        shown = protocol.render([ToolResult(documents)])
        segments.append(Segment("environment", shown, num_tokens=0, documents=documents))
        message = script.send(documents)
    messages = protocol.messages(segments)
    status = RolloutStatus.ANSWERED if protocol.is_valid(messages) else RolloutStatus.INVALID
    return Rollout(
        question=question,
        sample=sample,
        step=0,
        prepend_think=protocol.opening != "",
        segments=tuple(segments),
        status=status,
        messages=messages,
    )
