"""The agent protocol: tags, prompts, observations, and what makes a message valid.

A search turn is ``<think> ... </think> <search> query </search>``, an answer turn
``<think> ... </think> <answer> answer </answer>``. Everything here works on text and needs no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from calibadv.errors import UserError
from calibadv.types import Document

TAGS = tuple(f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/"))
STOP_TAGS = ("</search>", "</answer>")

_ANY_TAG = r"</?(?:think|search|information|answer)>"
# Text without a tag in it: it is looked for at each "<" and not at each character, which takes a tenth of the time.
_BLOCK = rf"<{{0}}>(?P<{{0}}>[^<]*(?:(?!{_ANY_TAG})<[^<]*)*)</{{0}}>"
_ACTION = re.compile(f"{_BLOCK.format('search')}|{_BLOCK.format('answer')}", re.DOTALL)
_MESSAGE = re.compile(rf"\s*{_BLOCK.format('think')}\s*(?:{_ACTION.pattern})\s*", re.DOTALL)
_THINK = re.compile(r"<think>([^<]*(?:(?!</think>)<[^<]*)*)")


@dataclass
class Protocol:
    """How the agent and its environment talk, and how long they may."""

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

    def __post_init__(self) -> None:
        """Check the limits."""
        for name in ("max_searches", "max_turn_tokens", "max_rollout_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"protocol.{name} is {getattr(self, name)}; it must be at least 1")

    def read_template(self) -> str:
        """The prompt template.

        Returns:
            Text that contains ``{question}``.

        Raises:
            UserError: there is no such template, or it lacks ``{question}``.
        """
        packaged = files("calibadv.protocol") / "templates" / f"{self.template}.txt"
        path = packaged if packaged.is_file() else Path(self.template)
        if not path.is_file():
            raise UserError(f"protocol.template '{self.template}' is neither 'instruct', 'short' nor a text file")
        text = path.read_text(encoding="utf-8")
        if "{question}" not in text:
            raise UserError(f"protocol.template '{self.template}' does not contain {{question}}")
        return text


@dataclass(frozen=True, slots=True)
class Message:
    """One policy message, parsed.

    ``action`` is the first complete search or answer block, also of a badly formatted message; None without one.
    ``content`` is the block's text, stripped. ``well_formed`` means one think block, one action block, nothing else.
    """

    think: str
    action: Literal["search", "answer"] | None
    content: str
    well_formed: bool


def parse_message(text: str, prepend_think: bool) -> Message:
    """Parse a policy message.

    Args:
        text: what the policy wrote.
        prepend_think: whether the environment had written ``<think>`` before it.

    Returns:
        Its think, its action and whether it is well formed.
    """
    whole = f"<think>{text}" if prepend_think else text
    think = _THINK.search(whole)
    action = _ACTION.search(whole)
    kind: Literal["search", "answer"] | None = None
    if action:
        kind = "answer" if action["search"] is None else "search"
    return Message(
        think=think[1] if think else "",
        action=kind,
        content=action[kind].strip() if action and kind else "",
        well_formed=_MESSAGE.fullmatch(whole) is not None,
    )


def is_valid(messages: Sequence[Message]) -> bool:
    """Whether a rollout has the valid format: well-formed searches with a query, at least one, then an answer.

    Args:
        messages: the policy's messages, in order.

    Returns:
        True if every message is well formed, all but the last search, and the last answers.
    """
    *searches, last = messages
    return (
        all(message.well_formed for message in messages)
        and bool(searches)
        and all(message.action == "search" and message.content for message in searches)
        and last.action == "answer"
    )


def disarm(text: str, special_strings: Iterable[str] = ()) -> str:
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


def render_observation(documents: Sequence[Document], prepend_think: bool, special_strings: Iterable[str] = ()) -> str:
    r"""What the environment writes after a search.

    Args:
        documents: what was found, best first; none is an ordinary observation.
        prepend_think: whether to end with ``<think>``.
        special_strings: the special and added tokens of the tokenizer, disarmed in titles and texts.

    Returns:
        ``\n\n<information>Doc 1(Title: T1) text1\nDoc 2(Title: T2) text2</information>\n\n``.
    """
    specials = tuple(special_strings)
    lines = [
        f"Doc {number}(Title: {disarm(document.title, specials)}) {disarm(document.text, specials)}"
        for number, document in enumerate(documents, 1)
    ]
    think = "<think>" if prepend_think else ""
    return "\n\n<information>{}</information>\n\n{}".format("\n".join(lines), think)
