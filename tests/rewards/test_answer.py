from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.records import answer, message, rollout, search

from calibadv.errors import ServiceError, UserError
from calibadv.interfaces import Reward
from calibadv.rewards import F1, CoverMatch, ExactMatch, cover_match, exact_match, f1, normalise_answer, score_rollouts
from calibadv.types import Question, RolloutStatus, Segment


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("a.n. Other", "other"),  # punctuation goes first, so "a.n." is the word "an"
        ("An apple, a day", "apple day"),
        ("anthem theatre", "anthem theatre"),  # articles inside words stay
        ("it's", "its"),
        ("Ångström", "ångström"),
        ("\u201cquoted\u201d", "\u201cquoted\u201d"),  # only ASCII punctuation is dropped
        ("The", ""),
    ],
)
def test_normalise_answer(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


def test_f1_counts_tokens_with_multiplicity() -> None:
    # predicted {new: 2, york: 1}, golden {new: 1, york: 1, city: 1}: shared 2, so 2 * 2 / (3 + 3)
    assert f1("new new york", ["New York City"]) == pytest.approx(2 / 3)


def test_f1_takes_the_best_golden_answer() -> None:
    assert f1("york", ["paris", "new york", "the york"]) == 1.0


def test_f1_is_zero_where_nothing_is_shared_even_between_empty_answers() -> None:
    assert f1("paris", ["rome"]) == 0.0
    assert f1("", ["the"]) == 0.0


def test_f1_of_seven_tenths_reaches_the_silver_threshold() -> None:
    # 7 of 10 tokens on both sides; computed as 2 p r / (p + r) in floating point it could fall short of 0.7
    shared = [f"s{n}" for n in range(7)]
    assert f1(" ".join([*shared, "x", "y", "z"]), [" ".join([*shared, "u", "v", "w"])]) >= 0.7


def test_exact_match_and_cover_match() -> None:
    assert exact_match("The Beatles!", ["beatles"]) == 1.0
    assert exact_match("the beatles band", ["beatles"]) == 0.0
    assert cover_match("it was the beatles band", ["rolling stones", "Beatles"]) == 1.0
    assert cover_match("beat", ["beatles"]) == 0.0
    assert cover_match("a party", ["art"]) == 1.0  # plain substring, as published


@given(st.text(), st.lists(st.text(), min_size=1, max_size=3))
def test_scores_lie_between_0_and_1_and_agree(prediction: str, golden: list[str]) -> None:
    value = f1(prediction, golden)
    assert 0.0 <= value <= 1.0
    assert f1(prediction, golden[::-1]) == value
    if normalise_answer(prediction) and exact_match(prediction, golden):
        assert value == 1.0
        assert cover_match(prediction, golden) == 1.0


@pytest.mark.parametrize(("reward", "expected"), [(F1(), 0.8), (ExactMatch(), 0.0), (CoverMatch(), 1.0)])
def test_rewards_score_by_their_formula(reward: Reward, expected: float) -> None:
    # shared 2 of 3 predicted and 2 golden: F1 = 2 * 2 / 5
    assert reward.score("new york usa", Question("q", "?", ["new york"])) == pytest.approx(expected)


def test_score_of_a_valid_rollout() -> None:
    (scored,) = score_rollouts([rollout(search("a"), answer(" old gold "))], F1())
    assert scored.answer == "old gold"
    assert scored.answer_score == scored.score == scored.f1 == pytest.approx(2 / 3)
    assert (scored.em, scored.cover_em) == (0.0, 1.0)


def test_score_of_an_invalid_rollout_is_gated_and_its_answer_score_is_not() -> None:
    (scored,) = score_rollouts([rollout(answer("gold"))], F1())  # no search: not valid
    assert (scored.answer, scored.answer_score) == ("gold", 1.0)
    assert (scored.score, scored.f1, scored.em, scored.cover_em) == (0.0, 0.0, 0.0, 0.0)


def test_score_without_an_answer_block() -> None:
    cut = Segment("policy", "<think>gold, I thi", num_tokens=5)
    scored = score_rollouts([rollout(search("a"), [cut]), rollout(search("a"))], F1())
    for each in scored:
        assert (each.answer, each.answer_score, each.score) == (None, None, 0.0)


def test_score_of_an_empty_answer_is_zero_and_valid() -> None:
    (scored,) = score_rollouts([rollout(search("a"), answer(""))], F1())
    assert scored.format_valid
    assert (scored.answer, scored.answer_score) == ("", 0.0)


def test_score_of_a_failed_search_is_zero_whatever_was_said() -> None:
    failed = rollout(search("a"), answer("gold"), status=RolloutStatus.SEARCH_FAILED)
    assert score_rollouts([failed], F1())[0].score == 0.0


def test_score_reads_the_think_that_the_environment_wrote() -> None:
    texts = ["plan</think><search>q</search>", "known</think><answer>gold</answer>"]
    turns = [[Segment("policy", texts[0], 3), Segment("environment", "", 1)], [Segment("policy", texts[1], 3)]]
    assert score_rollouts([rollout(*turns, prepend_think=True)], F1())[0].score == 1.0
    assert score_rollouts([rollout(*turns, prepend_think=False)], F1())[0].score == 0.0


def test_only_the_last_message_is_the_answer() -> None:
    early = [Segment("policy", message("t", "answer", "gold"), 3), Segment("environment", "", 1)]
    (scored,) = score_rollouts([rollout(early, answer("wrong"))], F1())
    assert scored.answer == "wrong"


class Says(Reward):
    """Return or raise what a test says."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def score(self, answer: str, question: Question) -> float:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.5, "1.5"),
        (-0.1, "-0.1"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (np.float32(2), "2.0"),
        (None, "None"),
        ("0.5", "str '0.5'"),
        (torch.tensor(0.5), "Tensor tensor(0.5000)"),
        (np.zeros((2, 1)), "ndarray array([[0.], [0.]])"),
    ],
)
def test_what_is_no_number_from_0_to_1_is_no_score(value: Any, shown: str) -> None:
    with pytest.raises(UserError) as refused:
        score_rollouts([rollout(search("a"), answer("gold"))], Says(value))
    assert str(refused.value) == f"Says scored {shown} on question 'q'; a reward lies in [0, 1]"


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(1), 1, True, np.bool_(False), np.int64(1)])
def test_numbers_of_all_kinds_are_scores(value: Any) -> None:
    (scored,) = score_rollouts([rollout(search("a"), answer("gold"))], Says(value))
    assert (scored.score, type(scored.score)) == (float(value), float)


def test_a_reward_that_raises_is_named_with_its_question() -> None:
    with pytest.raises(UserError) as refused:
        score_rollouts([rollout(search("a"), answer("gold"))], Says(KeyError("no\nkey")))
    assert str(refused.value).startswith("Says raised KeyError ('no\\nkey') on question 'q', answer str 'gold'; ")
    assert isinstance(refused.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [UserError("give a file"), ServiceError("the judge does not answer")])
def test_what_a_reward_says_to_the_user_is_left_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        score_rollouts([rollout(search("a"), answer("gold"))], Says(error))
    assert raised.value is error
