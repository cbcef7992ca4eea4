"""Records of text: questions, documents, messages, rollouts. ``calibadv.batch`` has those of tensors.

Shapes, used in every module: **B** rollouts in the batch, **G** rollouts per question, **T** tokens, **K** turns,
**V** vocabulary. A *turn* is one policy message and the observation that it caused; the last policy message of a
rollout is its *answer turn*, whatever it holds, and every earlier one is a *search turn*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Document:
    """One passage of the corpus."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class ScoredDocument:
    """A document that a retriever returned, with its score (larger is better)."""

    document: Document
    score: float


@dataclass(slots=True)
class Question:
    """One question and its accepted answers.

    Not frozen: Lightning moves what a data loader yields to the device, and refuses frozen dataclasses.
    """

    id: str
    question: str
    golden_answers: list[str]
    data_source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def supporting(self) -> tuple[str, list[str]]:
        """Return the ids, or without ids the titles, by which the metadata names the supporting documents."""
        for kind in ("id", "title"):
            labels = self.metadata.get(f"supporting_{kind}s")
            if isinstance(labels, list) and labels:
                return kind, list(dict.fromkeys(map(str, labels)))
        return "", []


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters: tokens are drawn from softmax(logits / temperature), greedily at temperature 0."""

    temperature: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class DrawKey:
    """The key of one turn's draws, which depend on nothing else: not on the batch, not on an earlier draw."""

    seed: int
    step: int
    question_id: str
    sample: int
    turn: int


class StopReason(StrEnum):
    """The reason for which an engine ended a segment."""

    TAG = "tag"
    """The text shows a stop string of the protocol, such as ``</search>`` or ``</answer>``."""
    END = "end"
    """The end-of-sequence token was drawn."""
    LENGTH = "length"
    """``max_tokens`` were drawn without either."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The tokens that an engine drew for one prompt.

    ``token_ids`` and ``logprobs`` have equal length, at most the ``max_tokens`` asked for; log-probabilities are finite
    and at most 0. The end-of-sequence token is included when it was drawn; no token after it, or after the one that
    completes a tag, is.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: StopReason


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, as a message asks for it."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One policy message, parsed: its think, and the calls or the answer that its action is.

    ``calls`` and ``answer`` are those of the message also where it is badly formatted; there are none of them in a
    message without an action. ``well_formed`` is whether the protocol accepts the whole of the text.
    """

    think: str
    calls: tuple[ToolCall, ...]
    answer: str | None
    well_formed: bool


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The result of one call of a tool: documents, or text; ``documents`` is None for a tool that finds none."""

    documents: tuple[Document, ...] | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rollout with one author; segments alternate, and a rollout starts with the policy's.

    ``token_ids`` are those that were sampled or shown, never re-encoded text; they and ``logprobs`` (of the engine,
    policy segments only) are empty for rollouts read from a file. ``documents`` are what an observation shows; None for
    an observation of tools that find no documents.
    """

    source: Literal["policy", "environment"]
    text: str
    num_tokens: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    documents: tuple[Document, ...] | None = ()


class RolloutStatus(StrEnum):
    """The way a rollout ended. Where several apply, the first in this order is the status."""

    SEARCH_FAILED = "search_failed"
    """A tool failed. Not trained, and in no statistic of its group."""
    TRUNCATED = "truncated"
    """A message without an action met ``max_turn_tokens``, or an observation did not fit ``max_rollout_tokens``."""
    INVALID = "invalid"
    """No action, or a bad format anywhere."""
    OUT_OF_TURNS = "out_of_turns"
    """After ``max_searches`` searches the policy searched again instead of answering."""
    ANSWERED = "answered"
    """Valid from the first message to the answer."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled episode, and what was computed of it. Stages return a new record; nobody writes into it.

    ``score`` is the reward: the answer score, 0 unless the format is valid. ``answer_score`` is the ungated value, None
    without an answer block. ``messages`` are the parsed policy segments, which stages read and none parses again.
    ``step_correctness`` has one entry per search turn, None for a turn whose tools find no documents. ``silver`` are
    the ids of the silver documents of the rollout's group. ``prompt`` is the prompt as text, special tokens included.
    """

    question: Question
    sample: int
    step: int
    prepend_think: bool
    segments: tuple[Segment, ...]
    status: RolloutStatus
    prompt_ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()
    answer: str | None = None
    score: float = 0.0
    answer_score: float | None = None
    f1: float = 0.0
    em: float = 0.0
    cover_em: float = 0.0
    step_correctness: tuple[float | None, ...] = ()
    silver: frozenset[str] = frozenset()
    prompt: str = ""

    @property
    def included(self) -> bool:
        """True if the rollout takes part in training and in the statistics of its group."""
        return self.status is not RolloutStatus.SEARCH_FAILED

    @property
    def format_valid(self) -> bool:
        """True if every message kept the format, searched at least once, and the last one answered."""
        return self.status is RolloutStatus.ANSWERED

    @property
    def policy_segments(self) -> list[Segment]:
        """The policy's messages, one per turn; the last is the answer turn."""
        return [segment for segment in self.segments if segment.source == "policy"]

    @property
    def turn_documents(self) -> list[tuple[Document, ...] | None]:
        """The documents that each search turn retrieved; None for a turn whose tools find none."""
        observed: list[tuple[Document, ...] | None] = []
        for segment in self.segments:
            if segment.source == "policy":
                observed.append(())
            else:
                observed[-1] = segment.documents
        return observed[:-1]

    @property
    def num_searches(self) -> int:
        """Number of searches whose observation is part of the rollout."""
        return sum(segment.source == "environment" for segment in self.segments)


Group = list[Rollout]
"""The rollouts of one question in one rollout step."""
