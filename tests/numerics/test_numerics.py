from __future__ import annotations

import math
import statistics
from hashlib import blake2b

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from calibadv.batch import LossInputs
from calibadv.losses import PPOClip
from calibadv.numerics.advantages import group_normalise
from calibadv.numerics.credit import (
    negative_search_turns,
    punished_tokens,
    rebalance_factors,
    scale_answers,
    soften,
)
from calibadv.numerics.kl import k3
from calibadv.numerics.logprobs import entropy, token_logprobs
from calibadv.numerics.losses import active_clips, clipped_surrogate
from calibadv.numerics.masked import check_shapes, group_sum, turn_means
from calibadv.numerics.rng import keyed_stream, uniforms
from calibadv.types import DrawKey


def normalised(rewards: list[float], groups: list[int], included: list[bool] | None = None) -> torch.Tensor:
    flags = [True] * len(rewards) if included is None else included
    return group_normalise(torch.tensor(rewards), torch.tensor(groups), torch.tensor(flags))


# --- shapes


def test_check_shapes_names_the_tensor_that_differs() -> None:
    check_shapes("B T, B, B K", torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"tensor 1 of \[B T, B\] has shape \[3\]; known sizes are .*'B': 2"):
        check_shapes("B T, B", torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"tensor 0 of \[N\] has shape \[2, 3\]"):
        check_shapes("N", torch.zeros(2, 3))


# --- sums and means


def test_group_sum() -> None:
    assert group_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1])).tolist() == [2.0, 5.0]


def test_turn_means_skip_tokens_of_no_turn() -> None:
    values = torch.tensor([[9.0, 1.0, 3.0, 9.0, 5.0], [9.0, 9.0, 9.0, 9.0, 9.0]])
    turns = torch.tensor([[-1, 0, 0, -1, 2], [-1, -1, -1, -1, -1]])
    # turn 0: (1 + 3) / 2; turn 1 has no token; turn 2: 5
    assert turn_means(values, turns, num_turns=3).tolist() == [[2.0, 0.0, 5.0], [0.0, 0.0, 0.0]]


# --- GRPO


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


# --- CalibAdv


def soft_penalty(advantages: torch.Tensor, correctness: torch.Tensor, turn_ids: torch.Tensor) -> torch.Tensor:
    return soften(advantages, correctness, *punished_tokens(advantages, turn_ids, correctness.shape[1]))


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


def test_negative_search_turns_are_those_before_the_answer() -> None:
    turn_advantages = torch.tensor([[-1.0, -0.5, -1.0], [-1.0, -1.0, 0.0], [1.0, 1.0, -1.0]])
    found = negative_search_turns(turn_advantages, torch.tensor([2, 1, 2]))
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


# --- loss


RATIO = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
ADVANTAGES = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])


def test_clipped_surrogate_by_hand() -> None:
    # min(1.5, 1.2); min(-1.5, -1.2); min(0.5, 0.8); min(-0.5, -0.8); 1.1 x 2
    surrogate = clipped_surrogate(RATIO, ADVANTAGES, clip_low=0.2, clip_high=0.2)
    assert_close(surrogate, torch.tensor([1.2, -1.5, 0.5, -0.8, 2.2]))


def test_active_clips_are_where_the_clipped_term_is_the_smaller_one() -> None:
    low, high = active_clips(RATIO, ADVANTAGES, clip_low=0.2, clip_high=0.2)
    assert low.tolist() == [False, False, False, True, False]
    assert high.tolist() == [True, False, False, False, False]


def test_the_two_sides_clip_apart() -> None:
    # DAPO's 0.2 / 0.28: 1.25 is not clipped, 0.75 is
    low, high = active_clips(torch.tensor([1.25, 0.75]), torch.tensor([1.0, -1.0]), clip_low=0.2, clip_high=0.28)
    assert (low.tolist(), high.tolist()) == ([False, True], [False, False])


def ppo_inputs(logprobs: torch.Tensor, rows: slice, denominator: float) -> LossInputs:
    ids = torch.arange(5)[rows]  # rollouts of one token
    return LossInputs(logprobs[rows], torch.zeros(5)[rows], None, ADVANTAGES[rows], denominator, ids, 0 * ids, 5)


def test_ppo_clip_loss_metrics_and_gradient() -> None:
    logprobs = RATIO.log().requires_grad_()
    loss, metrics = PPOClip().compute(ppo_inputs(logprobs, slice(None), 10.0))
    loss.backward()
    # -(1.2 - 1.5 + 0.5 - 0.8 + 2.2) / 10; the gradient of a token is -r A / 10 unless it is clipped
    assert loss.item() == pytest.approx(-0.16)
    assert_close(logprobs.grad, torch.tensor([0.0, 0.15, -0.05, 0.0, -0.22]))
    assert metrics == pytest.approx({"clip_low": 0.1, "clip_high": 0.1})


def test_ppo_clip_adds_up_over_micro_batches() -> None:
    logprobs = RATIO.log()
    whole, metrics = PPOClip().compute(ppo_inputs(logprobs, slice(None), 5.0))
    parts = [PPOClip().compute(ppo_inputs(logprobs, rows, 5.0)) for rows in (slice(0, 2), slice(2, 5))]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item())
    for name, value in metrics.items():
        assert sum(part[name] for _, part in parts) == pytest.approx(value)


@pytest.mark.parametrize("arguments", [{"clip_low": 0.0}, {"clip_low": 1.5}, {"clip_high": -0.1}])
def test_ppo_clip_refuses_ranges_without_meaning(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"clip_(low|high) is .*; it must"):
        PPOClip(**arguments)


def test_k3_by_hand() -> None:
    # d = ln 0.5 - ln 0.25 = ln 2: exp(-d) + d - 1 = 0.5 + 0.693147 - 1; and 0 for equal log-probabilities
    values = k3(torch.tensor([0.5, 0.3]).log(), torch.tensor([0.25, 0.3]).log())
    assert_close(values, torch.tensor([0.193147, 0.0]))


def test_k3_is_unbiased() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    expected = (policy * (policy / reference).log()).sum()
    assert_close((policy * k3(policy.log(), reference.log())).sum(), expected)


# --- log-probabilities


def test_token_logprobs_by_hand() -> None:
    # softmax of (ln 1, ln 2, ln 5) is (1/8, 2/8, 5/8)
    logits = torch.tensor([1.0, 2.0, 5.0]).log().repeat(3, 1)
    assert_close(token_logprobs(logits, torch.tensor([0, 1, 2])).exp(), torch.tensor([0.125, 0.25, 0.625]))


def test_log_probabilities_are_computed_in_float32() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.tensor([3, 0, 49, 7])
    exact = torch.log_softmax(logits.double(), -1)
    values = token_logprobs(logits, ids)
    assert values.dtype == torch.float32
    assert_close(values, exact[range(4), ids].float())
    assert_close(entropy(logits), -(exact.exp() * exact).sum(-1).float())


def test_token_logprobs_has_the_gradient_of_the_softmax() -> None:
    logits = torch.tensor([1.0, 2.0, 5.0]).log()[None].requires_grad_()
    token_logprobs(logits, torch.tensor([1])).sum().backward()
    assert_close(logits.grad, torch.tensor([[-0.125, 0.75, -0.625]]))  # one-hot minus softmax


def test_entropy_by_hand() -> None:
    certain = [0.0, -math.inf, -math.inf, -math.inf]
    assert_close(entropy(torch.tensor([[1.0] * 4, certain])), torch.tensor([math.log(4), 0.0]))


# --- draws


KEY = DrawKey(seed=1, step=2, question_id="q", sample=3, turn=4)


def philox4x64(counter: int, key: int) -> list[int]:
    """One block of Philox4x64-10, from its paper (Salmon et al. 2011)."""
    word = (1 << 64) - 1
    block, (low, high) = [counter, 0, 0, 0], (key & word, key >> 64)
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * block[0], 0xCA5A826395121157 * block[2]
        block = [(right >> 64) ^ block[1] ^ low, right & word, (left >> 64) ^ block[3] ^ high, left & word]
        low, high = (low + 0x9E3779B97F4A7C15) & word, (high + 0xBB67AE8584CAA73B) & word
    return block


def test_uniforms_are_the_top_bits_of_philox_keyed_by_blake2b() -> None:
    key = int.from_bytes(blake2b(b'[1, 2, "q", 3, 4]', digest_size=16).digest(), "little")
    raw = philox4x64(1, key) + philox4x64(2, key)  # NumPy counts from 1
    assert uniforms(KEY, 8).tolist() == [(bits >> 40) / 2**24 for bits in raw]
    assert uniforms(KEY, 2).dtype == np.float32
    assert uniforms(KEY, 2).tolist() == pytest.approx([0.3733883, 0.8575943])  # and so on every machine


def test_a_longer_call_begins_with_the_same_numbers() -> None:
    assert uniforms(KEY, 100)[:7].tolist() == uniforms(KEY, 7).tolist()
    assert uniforms(KEY, 0).tolist() == []


@pytest.mark.parametrize(
    "other",
    [
        DrawKey(0, 2, "q", 3, 4),
        DrawKey(1, 3, "q", 3, 4),
        DrawKey(1, 2, "q2", 3, 4),
        DrawKey(1, 2, "q", 4, 4),
        DrawKey(1, 2, "q", 3, 5),
        DrawKey(1, 2, "q\ud800", 3, 4),
    ],
)
def test_every_field_of_the_key_counts(other: DrawKey) -> None:
    assert uniforms(other, 8).tolist() != uniforms(KEY, 8).tolist()


@pytest.mark.parametrize(
    ("left", "right"), [(("ab", "c"), ("a", "bc")), (("1", 2), (1, 2)), ((1, 23), (12, 3)), (('a", "b',), ("a", "b"))]
)
def test_fields_of_a_key_are_kept_apart(left: tuple, right: tuple) -> None:
    assert keyed_stream(*left).random_raw() != keyed_stream(*right).random_raw()


def test_uniforms_are_uniform() -> None:
    values = uniforms(KEY, 40_000)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    # each tenth holds 4000 on average, with standard deviation 60: six of them
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    assert abs(counts - 4000).max() < 360
