from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from calibadv.numerics.advantages import group_normalise


def normalised(rewards: list[float], groups: list[int], included: list[bool] | None = None) -> torch.Tensor:
    flags = [True] * len(rewards) if included is None else included
    return group_normalise(torch.tensor(rewards), torch.tensor(groups), torch.tensor(flags))


def test_group_normalise_by_hand() -> None:
    # mean 0.5, deviations +-0.5 and 0, variance (0.25 + 0.25) / 2, std 0.5: 0.5 / 0.500001 = 0.999998
    assert_close(normalised([1.0, 0.0, 0.5], [0, 0, 0]), torch.tensor([0.999998, -0.999998, 0.0]))


def test_group_normalise_keeps_groups_apart() -> None:
    # [0, 1] has std sqrt(0.5): 0.5 / (0.707107 + 1e-6) = 0.707106
    both = normalised([1.0, 0.0, 0.5, 0.0, 1.0], [0, 1, 0, 0, 1])
    assert_close(both[[1, 4]], torch.tensor([-0.7071058, 0.7071058]))
    assert_close(both[[0, 2, 3]], torch.tensor([0.999998, 0.0, -0.999998]))


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 2 / 3, 1.0])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_equal_rewards_give_exactly_zero(reward: float, size: int) -> None:
    assert normalised([reward] * size, [0] * size).tolist() == [0.0] * size


def test_a_group_of_one_has_mean_0_and_std_1() -> None:
    assert_close(normalised([0.5, 1.0, 0.0], [0, 1, 2]), torch.tensor([0.5, 1.0, 0.0]) / (1 + 1e-6))


def test_rollouts_that_are_not_included_count_for_nothing() -> None:
    # without the third the group is [1, 0]: mean 0.5, std sqrt(0.5)
    values = normalised([1.0, 0.0, 0.7], [0, 0, 0], [True, True, False])
    assert_close(values, torch.tensor([0.7071058, -0.7071058, 0.0]))


@pytest.mark.parametrize("included", [[True, False], [False, False]])
def test_a_group_that_lost_members_is_left_out_whole(included: list[bool]) -> None:
    assert normalised([1.0, 0.5], [0, 0], included).tolist() == [0.0, 0.0]


def test_a_group_of_one_that_is_not_included_gets_nothing() -> None:
    assert normalised([1.0], [0], [False]).tolist() == [0.0]


groups_of_rewards = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 2 / 3, 1.0]), min_size=1, max_size=6), min_size=1
)


@settings(deadline=None)
@given(groups_of_rewards, st.randoms(use_true_random=False))
def test_group_normalise_equals_the_statistics_module_in_any_order(groups: list[list[float]], random) -> None:
    rows = [(group, reward) for group, rewards in enumerate(groups) for reward in rewards]
    random.shuffle(rows)
    values = normalised([reward for _, reward in rows], [group for group, _ in rows])
    for (group, reward), value in zip(rows, values.tolist(), strict=True):
        members = groups[group]
        mean, std = (statistics.mean(members), statistics.stdev(members)) if len(members) > 1 else (0.0, 1.0)
        assert value == pytest.approx((reward - mean) / (std + 1e-6), abs=1e-5)


@settings(deadline=None)
@given(groups_of_rewards)
def test_a_group_does_not_depend_on_its_place_in_the_batch(groups: list[list[float]]) -> None:
    ids = [group for group, rewards in enumerate(groups) for _ in rewards]
    together = normalised([reward for rewards in groups for reward in rewards], ids)
    alone = [value for rewards in groups for value in normalised(rewards, [0] * len(rewards)).tolist()]
    assert together.tolist() == alone
