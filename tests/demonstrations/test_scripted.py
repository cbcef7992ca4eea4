"""Scripted demonstrations: what they ask for was known, and what they answer was read."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from calibadv.demonstrations.play import play
from calibadv.demonstrations.scripted import LeftOutError, Style, clip, quoted, search_script
from calibadv.protocol import SearchProtocol
from calibadv.types import Document, Question, Rollout, RolloutStatus

FILM = Document("f", "Blue Tram", "Blue Tram is a 1944 film. It was directed by Mario Soffi.")
DIRECTOR = Document("d", "Mario Soffi", "Mario Soffi was a director. He was born in Florence in 1900.")
OTHER = Document("o", "Trams", "Trams run on rails.")
CORPUS = {"blue tram": [FILM, OTHER], "mario soffi": [DIRECTOR]}


def question(text: str, answer: str, *titles: str) -> Question:
    return Question("q", text, [answer], metadata={"supporting_titles": list(titles)})


def search(query: str) -> Sequence[Document]:
    return CORPUS.get(query.lower(), [OTHER])


def demonstration(asked: Question, prepend_think: bool = True, **style: Any) -> Rollout:
    script = search_script(asked, Style(opens_think=not prepend_think, **style), Random(0))
    return play(script, asked, search, SearchProtocol(prepend_think=prepend_think))


BORN = question("Where was the director of Blue Tram born?", "Florence", "Mario Soffi", "Blue Tram")


@pytest.mark.parametrize("prepend_think", [True, False])
def test_hops_are_followed_in_the_order_in_which_they_can_be(prepend_think: bool) -> None:
    """The file names the second hop first."""
    rollout = demonstration(BORN, prepend_think)
    assert rollout.status is RolloutStatus.ANSWERED
    assert [message.calls[0].arguments["query"] for message in rollout.messages[:-1]] == ["Blue Tram", "Mario Soffi"]
    assert "It was directed by Mario Soffi." in rollout.messages[1].think  # the sentence that leads on
    assert "He was born in Florence in 1900." in rollout.messages[2].think
    assert rollout.messages[2].answer == "Florence"
    assert rollout.turn_documents == [(FILM, OTHER), (DIRECTOR,)]


def test_phrasings_differ() -> None:
    texts = {demonstration(BORN, phrasing=number).segments[0].text for number in range(4)}
    assert len(texts) == 4


def test_a_wrong_turn_is_corrected() -> None:
    rollout = demonstration(BORN, wrong_turn=True)
    queries = [message.calls[0].arguments["query"] for message in rollout.messages[:-1]]
    assert queries == ["Where was the director of born", "Blue Tram", "Mario Soffi"]
    assert rollout.status is RolloutStatus.ANSWERED


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (Question("q", "Who?", ["x"]), "no supporting titles"),
        (question("Where was its director born?", "Florence", "Blue Tram"), "neither the question nor a passage"),
        (question("Who was Mario Soffi's teacher?", "Anna Bo", "Mario Soffi"), "an answer that no passage shows"),
        (question("When did Red Tram run?", "1900", "Red Tram"), "its own title does not find"),
        (question("a b c d?", "x", "a", "b", "c", "d"), "more searches than max_searches"),
    ],
)
def test_what_is_not_honest_is_left_out(asked: Question, reason: str) -> None:
    with pytest.raises(LeftOutError, match=reason):
        demonstration(asked)


def test_yes_and_no_need_not_be_read() -> None:
    rollout = demonstration(question("Are Blue Tram and Mario Soffi both films?", "no", "Blue Tram", "Mario Soffi"))
    assert rollout.messages[-1].answer == "no"
    assert rollout.num_searches == 2


def test_what_stands_in_parentheses_may_be_unknown() -> None:
    CORPUS["red tram"] = [Document("r", "Red Tram (film)", "Red Tram was shot in Oslo.")]
    rollout = demonstration(question("Where was Red Tram shot?", "Oslo", "Red Tram (film)"))
    assert rollout.messages[0].calls[0].arguments["query"] == "Red Tram"


def test_a_sentence_is_clipped_around_what_it_is_quoted_for() -> None:
    text = "The long film of many reels was in the end directed by Mario Soffi of Florence in spring."
    assert clip(text, 6, "Mario Soffi") == "... the end directed by Mario Soffi ..."
    assert clip(text, 4) == "The long film of ..."
    assert clip("A short one.", 4) == "A short one."


def test_initials_end_no_sentence() -> None:
    text = "It was made by E. V. V. Satya. He lived."
    assert quoted([Document("x", "X", text)], "E. V. V. Satya", 20) == "It was made by E. V. V. Satya."
