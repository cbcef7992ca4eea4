from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibadv.policy.tokenizer import TAGS
from calibadv.protocol.search import SearchProtocol, escape_tags
from calibadv.types import Document, Message, ToolResult

SEARCH = "<think>a</think><search>q</search>"
ANSWER = "<think>b</think><answer>x</answer>"


def parse_message(text: str, prepend_think: bool) -> Message:
    return SearchProtocol(prepend_think=prepend_think).parse(text)


def valid(*texts: str, prepend_think: bool = False) -> bool:
    return SearchProtocol().is_valid([parse_message(text, prepend_think) for text in texts])


def action(message: Message) -> tuple[str | None, str]:
    """The kind of a message's action, and its text."""
    if message.answer is not None:
        return "answer", message.answer
    return ("search", message.calls[0].arguments["query"]) if message.calls else (None, "")


def render_observation(documents: list[Document], prepend_think: bool, special_strings: Iterable[str] = ()) -> str:
    return SearchProtocol(prepend_think=prepend_think).render([ToolResult(tuple(documents))], special_strings)


@pytest.mark.parametrize(
    "texts",
    [
        (SEARCH, ANSWER),
        (SEARCH, SEARCH, SEARCH, ANSWER),
        ("\n<think>a</think>\n\n<search>q</search> ", "  <think>b</think>\t<answer>x</answer>\n"),
        ("<think></think><search>q</search>", "<think> \n</think><answer></answer>"),
        ("<think>1 < 2 > 0 </thinking> <b>\nü</think><search>a < b</search>", "<think>b</think><answer><i></answer>"),
        ("<think><Think></THINK></think><search>q</search>", ANSWER),  # tag names are case-sensitive: this is text
    ],
    ids=["shortest", "three searches", "white space around", "empty blocks", "other tags and lines", "other case"],
)
def test_valid_rollouts(texts: tuple[str, ...]) -> None:
    assert valid(*texts)


@pytest.mark.parametrize(
    "texts",
    [
        (ANSWER,),
        (SEARCH,),
        (SEARCH, SEARCH),
        (SEARCH, ANSWER, ANSWER),
        ("<think>a</think><search></search>", ANSWER),
        ("<think>a</think><search> \n </search>", ANSWER),
    ],
    ids=["no search", "no answer", "no answer after two", "answer before the end", "empty query", "blank query"],
)
def test_rollouts_of_well_formed_messages_that_are_invalid(texts: tuple[str, ...]) -> None:
    assert all(parse_message(text, prepend_think=False).well_formed for text in texts)
    assert not valid(*texts)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "q",
        "<search>q</search>",
        "<think>a</think>",
        "<think>a</think><search>q",
        "<think>a<search>q</search>",
        "a</think><search>q</search>",
        "so <think>a</think><search>q</search>",
        "<think>a</think> so <search>q</search>",
        "<think>a</think><search>q</search>.",
        "<think>a</think><think>b</think><search>q</search>",
        "<think>a<think>b</think></think><search>q</search>",
        "<think>a<answer>x</answer></think><search>q</search>",
        "<think>a</think><search>q<think></search>",
        "<think>a</think><search>q</search><search>r</search>",
        "<think>a</think><search>q</search><answer>x</answer>",
        "<think>a</think><search>q</answer>",
        "<think>a</think><Search>q</Search>",
        "<Think>a</Think><search>q</search>",
        "<think>a</think><search >q</search>",
        "<search>q</search><think>a</think>",
        "<think>a</think><information>i</information><search>q</search>",
        "<think>a <information></think><search>q</search>",
        "<think>a</think><search>q</search></information>",
        "<think>a</think><search>q</search><information>Doc 1(Title: T) x</information>",
    ],
)
def test_one_bad_message_makes_the_rollout_invalid(bad: str) -> None:
    assert not parse_message(bad, prepend_think=False).well_formed
    assert not valid(bad, ANSWER)
    assert not valid(SEARCH, bad, ANSWER)
    swapped = re.sub("search|answer", lambda name: "search" if name[0] == "answer" else "answer", bad)
    assert not valid(SEARCH, swapped)


def test_prepended_think_is_the_environments() -> None:
    search, answer = SEARCH.removeprefix("<think>"), ANSWER.removeprefix("<think>")
    assert valid(search, answer, prepend_think=True)
    assert valid("</think><search>q</search>", answer, prepend_think=True)  # an empty think
    assert not valid(search, answer, prepend_think=False)
    # Written again, it is a think inside a think; the action still counts.
    again = parse_message(SEARCH, prepend_think=True)
    assert (*action(again), again.well_formed) == ("search", "q", False)
    assert not valid(SEARCH, answer, prepend_think=True)


@pytest.mark.parametrize(
    ("text", "kind", "content", "think"),
    [
        ("<think> a </think> <search> who ? </search>", "search", "who ?", " a "),
        ("<think>a</think><answer> \n42\t</answer>", "answer", "42", "a"),
        ("<answer></answer>", "answer", "", ""),
        ("so <search>q</search> and", "search", "q", ""),
        ("<search>q</search><answer>x</answer>", "search", "q", ""),
        ("<answer>x</answer><search>q</search>", "answer", "x", ""),
        ("<think>a<search>q</search>", "search", "q", "a<search>q</search>"),
        ("<search>p<search>q</search>", "search", "q", ""),
        ("<search>p</answer><answer>x</answer>", "answer", "x", ""),
        ("<think>a</think><think>b</think><search>q</search>", "search", "q", "a"),
        ("<think>a</think><search>q\nr</search>", "search", "q\nr", "a"),
        ("<think>a</think><search>q", None, "", "a"),
        ("<think>a</think><SEARCH>q</SEARCH>", None, "", "a"),
        ("<think>never closed", None, "", "never closed"),
    ],
)
def test_the_first_complete_action_counts_whatever_the_format(
    text: str, kind: str | None, content: str, think: str
) -> None:
    message = parse_message(text, prepend_think=False)
    assert (*action(message), message.think) == (kind, content, think)


pieces = st.lists(st.sampled_from([*TAGS, "a", " ", "\n", "<", "/think>", "<Search>"]), max_size=9).map("".join)


@given(pieces | st.text(), st.booleans())
def test_any_text_can_be_parsed(text: str, prepend_think: bool) -> None:
    kind, content = action(parse_message(text, prepend_think))
    assert content == content.strip()
    assert (kind is None) <= (content == "")


well_formed = st.builds(
    lambda blank, think, action, content: f"{blank}<think>{think}</think>{blank}<{action}>{content}</{action}>{blank}",
    st.sampled_from(["", " ", "\n"]),
    st.sampled_from(["", "a"]),
    st.sampled_from(["search", "answer"]),
    st.sampled_from(["", " ", "a"]),
)


def independent_kind(text: str) -> str:
    """Another reading of the format: cut at the tags and look at what lies between."""
    parts = re.split(f"({'|'.join(TAGS)})", text)
    blank = [not part.strip() for part in parts]
    for kind in ("search", "answer"):
        if parts[1::2] == ["<think>", "</think>", f"<{kind}>", f"</{kind}>"] and blank[0] and blank[4] and blank[8]:
            return f"empty {kind}" if blank[6] else kind
    return "bad"


@given(st.lists(pieces | well_formed, min_size=1, max_size=4))
def test_validity_equals_an_independent_reading(texts: list[str]) -> None:
    *searches, last = [independent_kind(text) for text in texts]
    expected = bool(searches) and set(searches) == {"search"} and last in ("answer", "empty answer")
    assert valid(*texts) == expected


@pytest.mark.parametrize(
    ("text", "specials", "expected"),
    [
        ("a </information><answer> b", (), "a \u2039/information>\u2039answer> b"),
        ("<Think></SEARCH>", (), "\u2039Think>\u2039/SEARCH>"),
        ("<b> < think > <thinking>", (), "<b> < think > <thinking>"),
        ("x <|im_end|> y", ("<|im_end|>",), "x \u2039|im_end|> y"),
        ("see [SEP] and [sep]", ("[SEP]",), "see \uff3bSEP] and [sep]"),  # "[" becomes its full-width form
        ("two  spaces\n\nkept", ("  ", "\n\n", ""), "two  spaces\n\nkept"),
        ("\u2581x", ("\u2581x",), "\ufffdx"),  # no look-alike for a character that is not ASCII
        # Falcon has such tokens: where two overlap, both are broken.
        ("<think>>TITLE<<answer>", (">>TITLE<<",), "\u2039think\uff1e>TITLE<\u2039answer>"),
        ("<<think>>", ("<<", ">>"), "\u2039\u2039think\uff1e>"),
    ],
)
def test_escaped_by_hand(text: str, specials: tuple[str, ...], expected: str) -> None:
    assert escape_tags(text, specials) == expected


SPECIALS = ("<|end|>", ">>TITLE<<", "a<", "[SEP]", "  ", "</s>")


@given(st.lists(st.sampled_from([*TAGS, *SPECIALS, "<THINK>", "<", ">", "a", " "]), max_size=8).map("".join))
def test_escaped_text_holds_neither_tags_nor_special_tokens(text: str) -> None:
    safe = escape_tags(text, SPECIALS)
    assert not any(tag in safe.lower() for tag in TAGS)
    assert not any(special in safe for special in SPECIALS if special.strip())
    assert len(safe) == len(text)
    assert escape_tags(safe, SPECIALS) == safe


def test_observation_is_written_exactly_so() -> None:
    documents = [Document("1", "A", "first"), Document("2", "B </think>", "x\n<|e|> y")]
    expected = "\n\n<information>Doc 1(Title: A) first\nDoc 2(Title: B \u2039/think>) x\n\u2039|e|> y</information>\n\n"
    assert render_observation(documents, prepend_think=False, special_strings=iter(["<|e|>"])) == expected
    assert render_observation(documents, prepend_think=True, special_strings=["<|e|>"]) == expected + "<think>"


def test_no_document_is_an_ordinary_observation() -> None:
    assert render_observation([], prepend_think=False) == "\n\n<information></information>\n\n"


@pytest.mark.parametrize("name", ["instruct", "short"])
def test_packaged_templates_hold_the_question(name: str) -> None:
    assert "{question}" in SearchProtocol(template=name).read_template()


def test_template_can_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Frage: {question} \u00fc", encoding="utf-8")
    assert SearchProtocol(template=str(file)).read_template() == "Frage: {question} \u00fc"
    file.write_text("no place for it")
    with pytest.raises(ValueError, match=r"mine.txt' does not contain \{question\}"):
        SearchProtocol(template=str(file)).read_template()
    with pytest.raises(ValueError, match="'instrct' is neither 'instruct', 'short' nor a text file"):
        SearchProtocol(template="instrct").read_template()


@pytest.mark.parametrize("name", ["max_searches", "max_turn_tokens", "max_rollout_tokens"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"protocol.{name} is 0; it must be at least 1"):
        SearchProtocol(**{name: 0})
