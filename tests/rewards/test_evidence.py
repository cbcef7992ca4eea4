from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.records import answer, rollout, search

from calibadv.rewards import (
    F1,
    credit_rollouts,
    score_rollouts,
    silver_documents,
    step_correctness,
    true_step_correctness,
)
from calibadv.types import Rollout, RolloutStatus


def scored(*turns, score: float, **fields) -> Rollout:
    return replace(rollout(*turns, **fields), score=score)


def correctness(*turns, silver: str) -> tuple[float, ...]:
    return step_correctness(rollout(*turns, answer("x")), frozenset(silver.split()))


def test_silver_documents_are_those_of_all_turns_of_the_best_rollouts() -> None:
    group = [
        scored(search("a", "b"), search("c"), answer("x"), score=0.9),
        scored(search("d"), answer("x"), score=0.9),
        scored(search("e"), answer("x"), score=0.8),  # good, but not the best
        scored(search("f"), answer("x"), score=0.0),
    ]
    assert silver_documents(group) == {"a", "b", "c", "d"}


@pytest.mark.parametrize(("score", "expected"), [(0.7, {"a"}), (0.6999, set()), (0.0, set())])
def test_silver_documents_need_a_score_of_seven_tenths(score: float, expected: set[str]) -> None:
    assert silver_documents([scored(search("a"), answer("x"), score=score)]) == expected


@pytest.mark.parametrize("status", [RolloutStatus.INVALID, RolloutStatus.SEARCH_FAILED, RolloutStatus.OUT_OF_TURNS])
def test_silver_documents_ignore_rollouts_that_did_not_answer(status: RolloutStatus) -> None:
    other = scored(search("a"), answer("x"), score=1.0, status=status)
    assert silver_documents([other]) == frozenset()
    assert silver_documents([other, scored(search("b"), answer("x"), score=0.8)]) == {"b"}


def test_silver_documents_of_an_empty_group() -> None:
    assert silver_documents([]) == frozenset()


def test_correctness_is_the_share_of_silver_documents() -> None:
    # turn 0: a of {a, x, y}; turn 1: b and c of {b, c}; turn 2: none
    assert correctness(search("a", "x", "y"), search("b", "c"), search("z"), silver="a b c") == (1 / 3, 1.0, 0.0)


def test_a_document_counts_in_the_first_turn_that_retrieves_it() -> None:
    # turn 1 shares one document with turn 0, which is allowed, but only b is new: 1 / 2
    assert correctness(search("a"), search("a", "b"), silver="a b") == (1.0, 1 / 2)


def test_a_turn_that_shares_two_documents_with_one_earlier_turn_is_worth_nothing() -> None:
    assert correctness(search("a", "b"), search("a", "b", "c"), silver="a b c") == (1.0, 0.0)


def test_documents_shared_with_several_earlier_turns_do_not_add_up() -> None:
    # one shared with turn 0 and one with turn 1: never more than one with the same turn; c is new: 1 / 3
    assert correctness(search("a"), search("b"), search("a", "b", "c"), silver="a b c") == (1.0, 1.0, 1 / 3)


def test_ids_repeated_inside_an_observation_count_once() -> None:
    # D_t = {a, x}: 1 / 2, not 2 / 3; and the shared document a is one, not two
    assert correctness(search("a", "a", "x"), search("a", "a", "b"), silver="a b") == (1 / 2, 1 / 2)


def test_an_empty_observation_has_correctness_0() -> None:
    assert correctness(search(think="u"), search("a"), silver="a") == (0.0, 1.0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("one two three four", "one two three four", 0.0),  # similarity 1
        ("one two three four", "one two x y", 1.0),  # 1 - 2 / 4 = 0.5 is not above 0.5
        ("one two three four", "one two three y", 0.0),  # 1 - 1 / 4
        ("one two three", "one two", 0.0),  # one deletion of three words: 2 / 3
        ("one two three four five", "one two", 1.0),  # three deletions of five words: 2 / 5
        ("one two three four", "ONE TWO three four", 1.0),  # case counts: two substitutions, 0.5
        ("  one\ttwo\n\nthree ", "one two three", 0.0),  # only the words count
        ("", "", 0.0),  # two empty thinks are equal
        ("", "one", 1.0),  # an empty and a non-empty one have nothing in common
        ("one", "", 1.0),
    ],
)
def test_a_repeated_think_is_worth_nothing(first: str, second: str, expected: float) -> None:
    assert correctness(search("a", think=first), search("b", think=second), silver="a b") == (1.0, expected)


def test_a_think_is_compared_with_every_earlier_one() -> None:
    turns = [search("a", think="same words"), search("b", think="other"), search("c", think="same words")]
    assert correctness(*turns, silver="a b c") == (1.0, 1.0, 0.0)


def test_a_think_is_also_compared_with_one_whose_search_found_nothing() -> None:
    assert correctness(search(think="same words"), search("a", think="same words"), silver="a") == (0.0, 0.0)


@pytest.mark.parametrize("status", [s for s in RolloutStatus if s is not RolloutStatus.ANSWERED])
def test_invalid_rollouts_have_zeros_of_the_right_length(status: RolloutStatus) -> None:
    invalid = rollout(search("a"), search("b"), answer("x"), status=status)
    assert step_correctness(invalid, frozenset({"a", "b"})) == (0.0, 0.0)


def test_the_last_policy_segment_is_the_answer_turn_even_with_an_observation_after_it() -> None:
    ended = rollout(search("a"), search("b"), status=RolloutStatus.TRUNCATED)
    assert step_correctness(ended, frozenset({"a"})) == (0.0,)
    assert step_correctness(rollout(answer("x")), frozenset({"a"})) == ()


def test_credit_is_given_inside_each_group() -> None:
    first = [
        rollout(search("a"), answer("gold"), question_id="q0"),
        rollout(search("a", "x"), answer("no"), question_id="q0"),
    ]
    second = [
        rollout(search("b"), answer("no"), question_id="q1"),
        rollout(search("a", "b"), answer("gold"), question_id="q0", step=1),
    ]
    mixed = score_rollouts([first[0], second[0], first[1], second[1]], F1())
    # q1 has no good rollout, hence no silver documents; q0 of step 1 is another group than q0 of step 0
    assert [r.step_correctness for r in credit_rollouts(mixed)] == [(1.0,), (0.0,), (0.5,), (1.0,)]


def test_a_failed_search_takes_no_part_in_credit() -> None:
    failed = rollout(search("c"), answer("gold"), status=RolloutStatus.SEARCH_FAILED)
    others = [rollout(search("a"), answer("gold")), rollout(search("a", "c"), answer("no"))]
    # silver is a alone: what only the failed one retrieved is no evidence
    credited = credit_rollouts(score_rollouts([failed, *others], F1()))
    assert [each.step_correctness for each in credited] == [(0.0,), (1.0,), (0.5,)]


def test_true_correctness_by_ids_or_titles_whatever_the_format() -> None:
    turns = (search("a", "x"), search("a", "b"), search(think="u"), answer("no"))
    by_id = rollout(*turns, status=RolloutStatus.INVALID, metadata={"supporting_ids": ["a", "b"]})
    assert true_step_correctness(by_id) == (1 / 2, 1 / 2, 0.0)  # a of {a, x}; b of {a, b}, a was known; none
    by_title = rollout(*turns, metadata={"supporting_titles": ["T b"]})
    assert true_step_correctness(by_title) == (0.0, 1 / 2, 0.0)


def test_true_correctness_is_unknown_without_labels() -> None:
    assert true_step_correctness(rollout(search("a"), answer("x"))) is None
    assert true_step_correctness(rollout(search("a"), answer("x"), metadata={"supporting_ids": []})) is None


words = st.lists(st.sampled_from("uvwxyz"), max_size=6).map(" ".join)
turns_of = st.lists(st.tuples(st.lists(st.sampled_from("abcdef"), max_size=4), words), max_size=4)


def slow_similarity(left: list[str], right: list[str]) -> float:
    """The textbook recursion of Levenshtein's distance, row by row."""
    row = list(range(len(right) + 1))
    for i, word in enumerate(left, 1):
        previous, row = row, [i]
        for j, other in enumerate(right, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (word != other)))
    longest = max(len(left), len(right))
    return 1 - row[-1] / longest if longest else 1.0


@settings(deadline=None)
@given(turns_of, st.frozensets(st.sampled_from("abcdef")))
def test_correctness_equals_the_definition_written_out(turns: list[tuple[list[str], str]], silver: frozenset) -> None:
    expected = []
    for t, (documents, think) in enumerate(turns):
        earlier = turns[:t]
        seen = {d for other, _ in earlier for d in other}
        distinct = set(documents)
        repeated = any(len(distinct & set(other)) > 1 for other, _ in earlier)
        repeated |= any(slow_similarity(other.split(), think.split()) > 0.5 for _, other in earlier)
        new = len([d for d in distinct if d in silver and d not in seen])
        expected.append(0.0 if repeated or not distinct else new / len(distinct))
    episode = rollout(*(search(*documents, think=think) for documents, think in turns), answer("x"))
    if turns:
        assert step_correctness(episode, silver) == pytest.approx(expected)
    else:
        assert step_correctness(episode, silver) == ()
