from __future__ import annotations

import pytest
import torch
from support.records import answer, rollout, search

from calibadv.batch import answer_mask, collate, turn_values
from calibadv.estimators.gigpo import anchor_ids
from calibadv.types import Document, Rollout, RolloutStatus, Segment

DOCUMENT = Document("d", "T", "text")


def sampled() -> Rollout:
    """The worked example of the module, with a one-token prompt more."""
    return rollout(
        [
            Segment("policy", "", 2, token_ids=(11, 12), logprobs=(-0.5, -1.0)),
            Segment("environment", "", 1, token_ids=(21,), documents=(DOCUMENT,)),
            Segment("policy", "", 1, token_ids=(13,), logprobs=(-2.0,)),
        ],
        prompt_ids=(1, 2),
        score=0.5,
        step_correctness=(0.25,),
    )


def test_collate_by_hand() -> None:
    shorter = rollout([Segment("policy", "", 1, token_ids=(14,), logprobs=(-3.0,))], prompt_ids=(1, 2, 3))
    batch = collate([sampled(), shorter])
    assert batch.token_ids.tolist() == [[1, 2, 11, 12, 21, 13], [1, 2, 3, 14, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0]]
    assert batch.turn_ids.tolist() == [[-1, -1, 0, 0, -1, 1], [-1, -1, -1, 0, -1, -1]]
    assert batch.sampled_logprobs.tolist() == [[0, 0, -0.5, -1, 0, -2], [0, 0, 0, -3, 0, 0]]
    assert batch.answer_turn.tolist() == [1, 0]
    assert batch.group_ids.tolist() == [0, 0]
    assert batch.rewards.tolist() == [0.5, 0.0]
    assert batch.included.tolist() == [True, True]
    assert batch.step_correctness.tolist() == [[0.25, 0.0], [0.0, 0.0]]
    assert answer_mask(batch).int().tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]]


def test_rollouts_without_token_ids_keep_their_lengths() -> None:
    batch = collate([rollout(search("a", tokens=3), answer("x", tokens=2))])  # the observation has 4
    assert batch.turn_ids.tolist() == [[0, 0, 0, -1, -1, -1, -1, 1, 1]]
    assert batch.token_ids.tolist() == [[0] * 9]


def test_groups_are_the_rollouts_of_one_question_in_one_step() -> None:
    keys = [("b", 0), ("a", 0), ("b", 1), ("b", 0), ("a", 0)]
    batch = collate([rollout(answer("x"), question_id=name, step=step) for name, step in keys])
    assert batch.group_ids.tolist() == [0, 1, 2, 0, 1]


def failed(**fields) -> Rollout:
    return rollout(search("a"), answer("x"), status=RolloutStatus.SEARCH_FAILED, **fields)


def test_failed_searches_are_not_trained() -> None:
    batch = collate([failed(), rollout(answer("x")), rollout(answer("y"))])
    assert batch.included.tolist() == [False, True, True]
    assert batch.loss_mask.any(dim=1).tolist() == [False, True, True]


def test_a_group_with_one_rollout_left_is_left_out_whole_and_a_group_of_one_is_not() -> None:
    left, alone = rollout(answer("x")), rollout(answer("x"), question_id="other")
    batch = collate([failed(), left, alone])
    assert batch.included.tolist() == [False, False, True]
    assert batch.loss_mask.any(dim=1).tolist() == [False, False, True]
    assert turn_values(batch, batch.loss_mask.float()) == [None, None, [1.0]]


def test_anchors_are_equal_where_turns_start_from_the_same_documents() -> None:
    first = rollout(search("a", "b"), search("c"), answer("x"))
    second = rollout(search("b", "a", "a"), search(think="u"), answer("x"))  # the same set, another order
    third = rollout(answer("x"))
    (a, b, c), (d, e, f), (g, *rest) = anchor_ids(collate([first, second, third])).tolist()
    assert a == d == g  # all first turns share one state
    assert b == e != a  # after {a, b}
    assert len({a, b, c, f}) == 4  # after {c}, and after an observation without documents
    assert rest == [-1, -1]


def test_anchors_are_numbered_inside_each_group_and_skip_what_is_left_out() -> None:
    rows = [rollout(search("a"), answer("x"), question_id=name) for name in "pq"]
    batch = collate([*rows, failed(question_id="r")])
    assert anchor_ids(batch).tolist() == [[0, 1], [0, 1], [-1, -1]]


def test_an_observation_at_the_end_is_no_turn() -> None:
    batch = collate([rollout(search("a", tokens=1), search("b", tokens=1), status=RolloutStatus.TRUNCATED)])
    assert batch.answer_turn.tolist() == [1]
    assert batch.turn_ids.tolist() == [[0, -1, -1, -1, -1, 1, -1, -1, -1, -1]]
    assert anchor_ids(batch).tolist() == [[0, 1]]


def test_turn_values_average_the_tokens_of_each_policy_segment() -> None:
    batch = collate([rollout(search("a", tokens=2), answer("", tokens=0)), sampled()])
    per_token = torch.zeros(batch.turn_ids.shape)
    per_token[0, :2] = torch.tensor([1.0, 2.0])
    per_token[1, 2:6] = torch.tensor([3.0, 5.0, 100.0, 7.0])  # 100 stands on the observation
    assert turn_values(batch, per_token) == [[1.5, 0.0], [4.0, 7.0]]


@pytest.mark.parametrize("field", ["token_ids", "logprobs"])
def test_counts_that_do_not_match_the_tokens_are_an_error(field: str) -> None:
    wrong = rollout([Segment("policy", "", 3, **{field: (1,)})])
    with pytest.raises(AssertionError):
        collate([wrong])
