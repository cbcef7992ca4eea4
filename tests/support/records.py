"""Rollouts written in one line, for the tests of the method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calibadv.protocol.search import SearchProtocol
from calibadv.types import Document, Question, Rollout, RolloutStatus, Segment


def message(think: str, action: str, content: str) -> str:
    return f"<think>{think}</think><{action}>{content}</{action}>"


def search(*document_ids: str, think: str | None = None, tokens: int = 3) -> tuple[Segment, Segment]:
    """A search and its observation; unless given, the think is one word that no other search shares."""
    think = f"find-{'-'.join(document_ids)}" if think is None else think
    documents = tuple(Document(id=name, title=f"T {name}", text=f"about {name}") for name in document_ids)
    return (
        Segment("policy", message(think, "search", "query"), num_tokens=tokens),
        Segment("environment", "\n\n<information></information>\n\n", num_tokens=4, documents=documents),
    )


def answer(text: str, tokens: int = 2) -> tuple[Segment]:
    return (Segment("policy", message("done", "answer", text), num_tokens=tokens),)


def rollout(*turns: Sequence[Segment], status: RolloutStatus | None = None, **fields: Any) -> Rollout:
    """A rollout of question ``q`` with the golden answer ``gold``; by default its status is that of its text."""
    segments = tuple(segment for turn in turns for segment in turn)
    question = Question(
        id=fields.pop("question_id", "q"),
        question="what?",
        golden_answers=fields.pop("golden", ["gold"]),
        data_source=fields.pop("data_source", ""),
        metadata=fields.pop("metadata", {}),
    )
    prepend_think = fields.pop("prepend_think", False)
    protocol = SearchProtocol(prepend_think=prepend_think)
    messages = protocol.messages(segments)
    derived = RolloutStatus.ANSWERED if protocol.is_valid(messages) else RolloutStatus.INVALID
    return Rollout(
        question=question,
        sample=fields.pop("sample", 0),
        step=fields.pop("step", 0),
        prepend_think=prepend_think,
        segments=segments,
        messages=messages,
        status=status or derived,
        **fields,
    )
