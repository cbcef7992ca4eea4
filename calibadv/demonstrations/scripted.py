"""A script that answers a question by looking up its supporting passages, one after the other.

Every golden answer scores 1, so a demonstration that is right proves nothing: it would also teach to ask for what could
not be known, or to answer what was not read. So the script searches only for a title whose words stand in the question
or in text that it was shown before, says which sentence leads there, and answers only what it has read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from random import Random

from calibadv.types import Document, Question

_YES_NO = ("yes", "no")


class LeftOutError(Exception):
    """No honest demonstration of a question can be written; the message says why."""


@dataclass(frozen=True, slots=True)
class Style:
    """Style of a demonstration.

    Attributes:
        opens_think: whether the policy writes ``<think>`` itself.
        phrasing: which of several wordings; each question has as many demonstrations as there are.
        wrong_turn: whether the first search goes wrong, and is corrected.
        max_searches: the most searches.
        quoted_words: words of a sentence that a think quotes.
    """

    opens_think: bool
    phrasing: int = 0
    wrong_turn: bool = False
    max_searches: int = 3
    quoted_words: int = 14


# The first think, a later one after the sentence that leads on, and the think of the answer.
_PHRASINGS = (
    (
        "I need to find {title}.",
        "{quote} So next I search for {title}.",
        "{quote} So the answer is {answer}.",
    ),
    ("First look up {title}.", "It says: {quote} Now look up {title}.", "It says: {quote} The answer is {answer}."),
    (
        "The question is about {title}, so search for it.",
        "{quote} That leads to {title}.",
        "{quote} That gives the answer: {answer}.",
    ),
    ("Let me start with {title}.", "I read that {quote} Let me look at {title}.", "I read that {quote} So: {answer}."),
)
_AFTER_WRONG = (
    "This does not tell about {title}, so I search for it.",
    "That is not it. Search for {title}.",
    "No passage on {title} yet. I search for it by its name.",
    "These passages are about something else. Look up {title}.",
)
PHRASINGS = len(_PHRASINGS)


def supporting_titles(question: Question) -> list[str]:
    """Return the titles of a question's supporting passages, none if its file names none."""
    titles = question.metadata.get("supporting_titles")
    return list(dict.fromkeys(map(str, titles))) if isinstance(titles, list) else []


def search_script(question: Question, style: Style, rng: Random) -> Generator[str, Sequence[Document], None]:
    """Write the messages of a demonstration: one search per supporting title, and the answer.

    The order of the titles in a question's file says nothing: the next one is always one that can be reached.

    Args:
        question: with supporting titles in its metadata.
        style: how it is written.
        rng: chooses among titles that can be reached.

    Yields:
        One message after the other; it is sent what each search found.

    Raises:
        LeftOutError: no honest demonstration can be written.
    """
    left = supporting_titles(question)
    if not left:
        raise LeftOutError("no supporting titles")
    if len(left) + style.wrong_turn > style.max_searches:
        raise LeftOutError("more searches than max_searches")
    first, later, last = _PHRASINGS[style.phrasing % PHRASINGS]
    shown: list[Document] = []
    think = ""
    if style.wrong_turn:
        title, query = _next_search(question, left, shown, rng)
        shown += yield _message(style, first.format(title=query), "search", _wrong_query(question, query))
        if _find(shown, title):
            raise LeftOutError("a wrong turn that finds the passage")
        think = _AFTER_WRONG[style.phrasing % PHRASINGS].format(title=query)
    while left:
        if not think:
            title, query = _next_search(question, left, shown, rng)
            quote = quoted(shown, query, style.quoted_words)
            think = later.format(quote=quote, title=query) if quote else first.format(title=query)
        documents = yield _message(style, think, "search", query)
        if not _find(documents, title):
            raise LeftOutError("a passage that its own title does not find")
        shown += documents
        left.remove(title)
        think = ""
    yield _message(style, *_answer(question, shown, last, style.quoted_words))


def _next_search(question: Question, left: Sequence[str], shown: Sequence[Document], rng: Random) -> tuple[str, str]:
    """A title that can be reached by now, and the query for it; one that the question names comes first."""
    known = _words(" ".join([question.question, *(f"{d.title} {d.text}" for d in shown)]))
    reachable = {title: query for title in left if (query := _honest_query(title, known))}
    if not reachable:
        raise LeftOutError("a title that neither the question nor a passage names")
    title = rng.choice(_named_by(question.question, list(reachable)) or list(reachable))
    return title, reachable[title]


def _answer(question: Question, shown: Sequence[Document], phrasing: str, words: int) -> tuple[str, str, str]:
    """Think, action and answer of the last message."""
    yes_no = next((answer for answer in question.golden_answers if answer.casefold() in _YES_NO), None)
    if yes_no:
        titles = supporting_titles(question)
        found = [document for title in titles if (document := _find(shown, title))]
        quote = " ".join(clip(_first_sentence(document.text), words // 2) for document in found[:2])
        return phrasing.format(quote=quote, answer=yes_no), "answer", yes_no
    for answer in question.golden_answers:
        if quote := quoted(shown, answer, words):
            return phrasing.format(quote=quote, answer=answer), "answer", answer
    raise LeftOutError("an answer that no passage shows")


def _message(style: Style, think: str, action: str, content: str) -> str:
    opening = "<think>" if style.opens_think else ""
    return f"{opening}{think}</think>\n<{action}>{content}</{action}>"


def _honest_query(title: str, known: set[str]) -> str | None:
    """The title, or the title without what stands in parentheses, if all its words are known."""
    for query in (title, re.sub(r"\s*\([^()]*\)$", "", title)):
        words = _words(query)
        if words and words <= known:
            return query
    return None


def _named_by(question: str, titles: Sequence[str]) -> list[str]:
    """Those titles whose words all stand in the question, which a reader would look up first."""
    known = _words(question)
    return [title for title in titles if _honest_query(title, known)]


def _wrong_query(question: Question, query: str) -> str:
    """A query of the question's own words that leaves out those of the title."""
    left = [word for word in re.findall(r"\w+", question.question) if word.casefold() not in _words(query)]
    return " ".join(left[:6])


def _find(documents: Sequence[Document], title: str) -> Document | None:
    return next((document for document in documents if document.title == title), None)


def quoted(documents: Sequence[Document], phrase: str, words: int) -> str:
    """The sentence of the latest document that names a phrase, clipped around it; empty if none does."""
    for document in reversed(documents):
        for sentence in _sentences(document.text):
            if _names(sentence, phrase):
                return clip(sentence, words, phrase)
    titled = next((document for document in reversed(documents) if _names(document.title, phrase)), None)
    return "" if titled is None else clip(_first_sentence(titled.text), words) or titled.title


def _names(text: str, phrase: str) -> bool:
    wanted = normalized(phrase)
    return bool(wanted) and f" {wanted} " in f" {normalized(text)} "


def clip(sentence: str, words: int, phrase: str = "") -> str:
    """Shorten a sentence to so many words, from its start on or around a phrase, with a mark for what is left out."""
    all_words = sentence.split()
    if len(all_words) <= words:
        return sentence
    wanted = normalized(phrase).split()
    size = max(words, len(wanted))
    plain = [normalized(word) for word in all_words]
    place = next((n for n, word in enumerate(plain) if wanted and word.startswith(wanted[0])), 0)
    start = 0 if place + len(wanted) <= size else min(place + len(wanted) - size, place)
    kept = all_words[start : start + size]
    return ("... " if start else "") + " ".join(kept) + (" ..." if start + size < len(all_words) else "")


def _sentences(text: str) -> list[str]:
    # Not behind an initial: "E. V. V. Satyanarayana" is one name.
    return [sentence for sentence in re.split(r"(?<=\w\w[.!?])\s+(?=[^a-z])", text) if sentence.strip()]


def _first_sentence(text: str) -> str:
    return next(iter(_sentences(text)), "")


def normalized(text: str) -> str:
    """Lower case, composed letters, and single blanks between words: how phrases are compared."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold()))


def _words(text: str) -> set[str]:
    return set(normalized(text).split())
