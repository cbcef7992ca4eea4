"""The protocol of search agents: tags, prompts, observations, and what makes a message valid.

A search turn is ``<think> ... </think> <search> query </search>``, an answer turn
``<think> ... </think> <answer> answer </answer>``. Everything here works on text and needs no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import ClassVar, Literal

from typing_extensions import override

from calibadv.errors import UserError
from calibadv.interfaces import Protocol, Tool
from calibadv.policy.tokenizer import STOP_TAGS, TAGS
from calibadv.types import Message, ToolCall, ToolResult

_ANY_TAG = r"</?(?:think|search|information|answer)>"
# Text without a tag in it: it is looked for at each "<" and not at each character, which takes a tenth of the time.
_BLOCK = rf"<{{0}}>(?P<{{0}}>[^<]*(?:(?!{_ANY_TAG})<[^<]*)*)</{{0}}>"
_ACTION = re.compile(f"{_BLOCK.format('search')}|{_BLOCK.format('answer')}", re.DOTALL)
_MESSAGE = re.compile(rf"\s*{_BLOCK.format('think')}\s*(?:{_ACTION.pattern})\s*", re.DOTALL)
_THINK = re.compile(r"<think>([^<]*(?:(?!</think>)<[^<]*)*)")


@dataclass
class SearchProtocol(Protocol):
    """One search engine, called by tags: ``<think>``, then ``<search>`` or ``<answer>``."""

    tags: ClassVar[tuple[str, ...]] = TAGS
    stop_strings: ClassVar[tuple[str, ...]] = STOP_TAGS
    tools: ClassVar[tuple[str, ...]] = ("search",)

    prepend_think: bool = True
    """Let the environment write each ``<think>``, so that it is never trained (the third part of CalibAdv)."""
    template: str = "instruct"
    """Prompt with ``{question}`` in it: ``instruct``, ``short``, or the path of a text file."""
    chat_template: Literal["auto", "never"] = "auto"
    """Wrap the prompt in the tokenizer's chat template where it has one, or never."""
    max_searches: int = 4
    """Searches per rollout; after them, one last message may answer."""
    max_turn_tokens: int = 500
    """The most tokens of one policy message."""
    max_rollout_tokens: int = 4096
    """The most tokens of a rollout, everything counted from the prompt on."""
    max_document_tokens: int | None = None
    """Passages are cut to so many tokens before they are shown; by default they are shown whole."""

    def __post_init__(self) -> None:
        for name in ("max_searches", "max_turn_tokens", "max_rollout_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"protocol.{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_document_tokens is not None and self.max_document_tokens < 1:
            raise UserError(
                f"protocol.max_document_tokens is {self.max_document_tokens}; it must be at least 1, or null"
            )

    @property
    @override
    def opening(self) -> str:
        return "<think>" if self.prepend_think else ""

    def read_template(self) -> str:
        """Read the prompt template: text that contains ``{question}``, and perhaps ``{tools}``."""
        packaged = files("calibadv.protocol") / "templates" / f"{self.template}.txt"
        path = packaged if packaged.is_file() else Path(self.template)
        if not path.is_file():
            raise UserError(f"protocol.template '{self.template}' is neither 'instruct', 'short' nor a text file")
        text = path.read_text(encoding="utf-8")
        if "{question}" not in text:
            raise UserError(f"protocol.template '{self.template}' does not contain {{question}}")
        return text

    @override
    def prompt(self, question: str, tools: Sequence[Tool] = (), special_strings: Iterable[str] = ()) -> str:
        described = [f"{tool.name}: {tool.description} Arguments: {json.dumps(tool.parameters)}" for tool in tools]
        text = self.read_template().replace("{tools}", "\n".join(described))
        return text.replace("{question}", self.escape(question, special_strings))

    @override
    def parse(self, text: str) -> Message:
        whole = self.opening + text
        think = _THINK.search(whole)
        action = _ACTION.search(whole)
        query = (action["search"] or "").strip() if action else ""
        return Message(
            think=think[1] if think else "",
            calls=(ToolCall("search", {"query": query}),) if query else (),
            answer=action["answer"].strip() if action and action["answer"] is not None else None,
            well_formed=_MESSAGE.fullmatch(whole) is not None,
        )

    @override
    def is_valid(self, messages: Sequence[Message]) -> bool:
        *searches, last = messages
        return (
            all(message.well_formed for message in messages)
            and bool(searches)
            and all(message.calls for message in searches)
            and last.answer is not None
        )

    @override
    def render(self, results: Sequence[ToolResult], special_strings: Iterable[str] = ()) -> str:
        specials = tuple(special_strings)
        documents = [document for result in results for document in result.documents or ()]
        lines = [
            f"Doc {number}(Title: {self.escape(document.title, specials)}) {self.escape(document.text, specials)}"
            for number, document in enumerate(documents, 1)
        ]
        lines += [self.escape(result.text, specials) for result in results if result.text]
        return "\n\n<information>{}</information>\n\n{}".format("\n".join(lines), self.opening)

    @override
    def escape(self, text: str, special_strings: Iterable[str] = ()) -> str:
        return escape_tags(text, special_strings)


def escape_tags(text: str, special_strings: Iterable[str] = ()) -> str:
    """Replace what could be read as a tag or a special token by a look-alike.

    A document that contains ``</information><answer>`` must not end the observation, and a question that contains
    ``<|im_end|>`` must not end the prompt.

    Args:
        text: a title, a document's text or a question.
        special_strings: the special and added tokens of the tokenizer.

    Returns:
        ``text`` with the first character of each such string replaced: ``<`` by U+2039, another ASCII character by its
        full-width form.
    """
    specials = [re.escape(special) for special in special_strings if special.strip()]
    # Looking ahead takes one character at a time, so that of two that overlap, as in <think>>TITLE<<, both are broken.
    pattern = "(?={}).".format("|".join([f"(?i:{_ANY_TAG})", *specials]))
    return re.sub(pattern, lambda first: _look_alike(first[0]), text, flags=re.DOTALL)


def _look_alike(character: str) -> str:
    if character == "<":
        return "\u2039"
    return chr(ord(character) + 0xFEE0) if "!" <= character <= "~" else "\ufffd"
