"""Seams of an episode: who samples, in what language, and with which tools."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from calibadv.errors import ToolError
from calibadv.interfaces.seam import Seam
from calibadv.types import (
    Completion,
    Document,
    DrawKey,
    Message,
    Metrics,
    Sampling,
    ScoredDocument,
    Segment,
    ToolResult,
)

if TYPE_CHECKING:
    from calibadv.policy.policy import Policy
    from calibadv.policy.tokenizer import AgentTokenizer


class Engine(Seam):
    """Samples tokens from the policy.

    Attributes:
        max_model_len: the most tokens of a prompt and its continuation together; None where there is no limit.
    """

    _renamed: ClassVar[Mapping[str, str]] = {"check": "validate", "rest": "release"}
    max_model_len: int | None = None

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]
    ) -> list[Completion]:
        """Continue each prompt until a stop string, end of sequence or ``sampling.max_tokens``.

        Args:
            prompts: token ids of each prompt.
            sampling: temperature and the most tokens to draw.
            keys: the key of the draws of each prompt.

        Returns:
            One completion per prompt, in the same order. The stop strings are those of the policy's tokenizer.
        """

    def validate(self) -> None:  # most engines need nothing
        """Check that sampling can start. Called before a run writes its first file.

        Raises:
            UserError: something that the engine needs is missing; the message names it and the remedy.
            ServiceError: a service that it needs does not answer.
        """

    @abstractmethod
    def sync(self, policy: Policy) -> None:
        """Sample from ``policy`` as it is now. Called before the first rollout and after every update."""

    def release(self) -> None:  # most engines have nothing to free
        """End a phase of sampling, also after an error: drop requests in flight, free what only sampling needs."""


class StreamingEngine(Engine):
    """An engine with continuous batching: requests join and leave while others are in flight.

    Rollouts then go on one by one, as soon as their searches come back, and none waits for the slowest.
    """

    @abstractmethod
    def submit(self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]) -> list[int]:
        """Request a continuation of each prompt, as ``generate`` makes it, without waiting for it.

        Args:
            prompts: token ids of each prompt.
            sampling: limits and temperature.
            keys: one per prompt; equal keys draw equal tokens.

        Returns:
            One number per prompt, by which ``collect`` names it.
        """

    @abstractmethod
    def collect(self) -> dict[int, Completion]:
        """Sample for a moment, and return the requests that ended meanwhile, by number; often none."""

    @override
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]
    ) -> list[Completion]:
        numbers = self.submit(prompts, sampling, keys)
        done: dict[int, Completion] = {}
        while len(done) < len(numbers):
            done.update(self.collect())
        return [done[number] for number in numbers]


class Protocol(Seam):
    """The language of agent and environment: prompt, tags, messages and observations. Works on text alone.

    Attributes:
        tags: strings that the tokenizer must return unchanged; those that it would break are added to it.
        stop_strings: strings that end a message.
        tools: names of the tools that a message can call.
        chat_template: whether the prompt is wrapped in the tokenizer's chat template where it has one.
        max_searches: messages of a rollout that may call tools; after them, one last message may answer.
        max_turn_tokens: the most tokens of one policy message.
        max_rollout_tokens: the most tokens of a rollout, the prompt included.
        max_document_tokens: the most tokens of a document that is shown; None for all of it.
    """

    tags: ClassVar[tuple[str, ...]]
    stop_strings: ClassVar[tuple[str, ...]]
    tools: ClassVar[tuple[str, ...]]
    chat_template: Literal["auto", "never"]
    max_searches: int
    max_turn_tokens: int
    max_rollout_tokens: int
    max_document_tokens: int | None = None

    @property
    @abstractmethod
    def opening(self) -> str:
        """Text that the environment writes before each message."""

    @abstractmethod
    def prompt(self, question: str, tools: Sequence[Tool] = (), special_strings: Iterable[str] = ()) -> str:
        """Write the prompt of a question.

        Args:
            question: its text.
            tools: what a message can call, for protocols that describe it.
            special_strings: special tokens of the tokenizer, to be escaped in foreign text.

        Returns:
            The prompt, with chat roles where the protocol uses them.
        """

    @abstractmethod
    def parse(self, text: str) -> Message:
        """Parse a policy message, well formed or not."""

    @abstractmethod
    def render(self, results: Sequence[ToolResult], special_strings: Iterable[str] = ()) -> str:
        """Write the observation that follows a message: the results of its calls, and the next opening."""

    @abstractmethod
    def escape(self, text: str, special_strings: Iterable[str] = ()) -> str:
        """Replace what could be read as a tag or a special token in foreign text."""

    @abstractmethod
    def is_valid(self, messages: Sequence[Message]) -> bool:
        """Return True if the messages of a rollout have the valid format, from the first to the answer."""

    def prompt_ids(self, question: str, tokenizer: AgentTokenizer, tools: Sequence[Tool] = ()) -> list[int]:
        """Encode the prompt of a question, with the opening of the first message."""
        text = self.prompt(question, tools, tokenizer.special_strings)
        return tokenizer.encode_prompt(text, self.chat_template == "auto", self.opening)

    def settings(self) -> dict[str, Any]:
        """Return what tells this protocol from another; checkpoints hold it, and a resume compares it."""
        return dataclasses.asdict(self) if dataclasses.is_dataclass(self) else dict(vars(self))

    def messages(self, segments: Iterable[Segment]) -> tuple[Message, ...]:
        """Parse the policy segments of a rollout."""
        return tuple(self.parse(segment.text) for segment in segments if segment.source == "policy")


class Tool(Seam):
    """Something that a message can call, such as a search engine or a calculator.

    Attributes:
        name: by which messages call it.
        description: one sentence for the prompt.
        parameters: JSON schema of its arguments.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]

    @abstractmethod
    def call(self, arguments: Sequence[Mapping[str, Any]]) -> Sequence[ToolResult | ToolError]:
        """Run a batch of calls.

        Args:
            arguments: those of each call.

        Returns:
            One result per call, in the same order; an error for a call that failed, which fails its own rollout only.

        Raises:
            ToolError: all calls failed.
        """

    def metrics(self) -> Metrics:
        """Return values to plot, by name, since the last call; none by default."""
        return {}


class Retriever(Seam):
    """Finds documents.

    Attributes:
        top_k: documents that an episode asks for per search.
        corpus: the documents that it searches, in the order that breaks ties; None where they are out of reach.
    """

    top_k: int
    corpus: Sequence[Document] | None = None

    @abstractmethod
    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        """Find the best documents of each query, best first, ties in the order of the corpus.

        Args:
            queries: texts to search for. An empty one finds nothing.
            top_k: the most documents per query. Documents with score 0 are left out, so there may be fewer or none.

        Returns:
            One list per query, in the same order.

        Raises:
            RetrievalError: the search could not be made; as PartialRetrievalError where only some queries failed, as
                OutageError where it is worth waiting. An empty list means that nothing matches, never a failure.
        """

    def metrics(self) -> Metrics:
        """Return values to plot, by name, since the last call, such as the hit rate of a cache; none by default."""
        return {}
