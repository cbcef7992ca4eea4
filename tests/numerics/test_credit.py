from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from calibadv.numerics.credit import (
    negative_tokens,
    penalized_search_turns,
    rebalance_factors,
    scale_answers,
    scale_negative_turns,
)


def soft_penalty(advantages: torch.Tensor, correctness: torch.Tensor, turn_ids: torch.Tensor) -> torch.Tensor:
    return scale_negative_turns(advantages, correctness, *negative_tokens(advantages, turn_ids, correctness.shape[1]))


def answer_rebalance(
    advantages: torch.Tensor, answers: torch.Tensor, groups: torch.Tensor, ratio: float
) -> torch.Tensor:
    return scale_answers(advantages, answers, groups, rebalance_factors(advantages, answers, groups, ratio))


def test_soft_penalty_by_hand() -> None:
    advantages = torch.tensor([[0.0, -2.0, -2.0, 0.0, -2.0, -2.0], [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]])
    turn_ids = torch.tensor([[-1, 0, 0, -1, 1, 2], [-1, 0, 0, -1, 1, -1]])
    correctness = torch.tensor([[0.25, 1.0, 0.0], [1.0, 0.0, 0.0]])
    # turn 0: -2 x 0.75; turn 1: -2 x 0; the answer (turn 2) and the positive rollout stay
    expected = torch.tensor([[0.0, -1.5, -1.5, 0.0, 0.0, -2.0], [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]])
    assert_close(soft_penalty(advantages, correctness, turn_ids), expected)


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), st.lists(st.floats(0, 1, width=32), min_size=3))
def test_soft_penalty_only_shrinks_negative_advantages(values: list[float], correctness: list[float]) -> None:
    advantages = torch.tensor([values])
    softened = soft_penalty(advantages, torch.tensor([correctness]), torch.tensor([[0, 1, 2, -1]]))
    negative = (advantages < 0) & torch.tensor([[True, True, True, False]])
    assert softened[~negative].tolist() == advantages[~negative].tolist()
    assert bool((advantages[negative] <= softened[negative]).all())
    assert bool((softened[negative] <= 0).all())


def test_penalized_search_turns_are_those_before_the_answer() -> None:
    turn_advantages = torch.tensor([[-1.0, -0.5, -1.0], [-1.0, -1.0, 0.0], [1.0, 1.0, -1.0]])
    found = penalized_search_turns(turn_advantages, torch.tensor([2, 1, 2]))
    assert found.tolist() == [[True, True, False], [True, False, False], [False, False, False]]


ANSWERS = torch.tensor([[False, True, False, False], [False, True, True, True]])


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 3.0), (1.5, 4.5), (0.5, 1.5)])
def test_answer_rebalance_by_hand(ratio: float, expected: float) -> None:
    advantages = torch.tensor([[2.0, 2.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    # over answer tokens P = 2 and N = 3: the positive token gets 2 x ratio x 3 / 2; search tokens stay
    balanced = answer_rebalance(advantages, ANSWERS, torch.tensor([0, 0]), ratio)
    assert_close(balanced, torch.tensor([[2.0, expected, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]]))
    factors = rebalance_factors(advantages, ANSWERS, torch.tensor([0, 0]), ratio)
    assert factors.tolist() == pytest.approx([expected / 2])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_answer_rebalance_of_one_sided_groups_is_zero(sign: float) -> None:
    balanced = answer_rebalance(torch.full((2, 4), sign), ANSWERS, torch.tensor([0, 0]), 1.0)
    assert_close(balanced, torch.where(ANSWERS, 0.0, sign))


def test_answer_rebalance_treats_each_group_alone() -> None:
    advantages = torch.tensor([[2.0], [-1.0], [1.0], [-3.0], [1.0]])
    # group 0: P 2, N 1; group 1: P 1, N 3; group 2 has no negative side
    balanced = answer_rebalance(advantages, torch.ones(5, 1, dtype=torch.bool), torch.tensor([0, 0, 1, 1, 2]), 1.0)
    assert balanced.flatten().tolist() == pytest.approx([1.0, -1.0, 3.0, -3.0, 0.0])


@settings(deadline=None)
@given(
    st.lists(st.integers(-20, 20).map(lambda n: n / 10), min_size=2, max_size=12),
    st.sampled_from([0.5, 1.0, 1.5]),
)
def test_answer_rebalance_reaches_the_target(values: list[float], ratio: float) -> None:
    advantages = torch.tensor(values)[:, None]
    ones = torch.ones_like(advantages, dtype=torch.bool)
    balanced = answer_rebalance(advantages, ones, torch.zeros(len(values), dtype=torch.int64), ratio)
    positive, negative = balanced.clamp(min=0).sum().item(), -balanced.clamp(max=0).sum().item()
    if any(v > 0 for v in values) and any(v < 0 for v in values):
        assert positive == pytest.approx(ratio * negative, rel=1e-5)
        assert negative == pytest.approx(-sum(v for v in values if v < 0), rel=1e-5)
    else:
        assert (positive, negative) == (0.0, 0.0)
