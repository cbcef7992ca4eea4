from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.agents import Bigram, episode

from calibadv.batch import RolloutBatch, collate
from calibadv.numerics.logprobs import message_perplexities
from calibadv.training.logprobs import BatchLogprobs, LossNormalizer, UpdateBatch, compute_logprobs, loss_inputs
from calibadv.training.metrics import stability_metrics
from calibadv.training.minibatches import micro_batches, mini_batches
from calibadv.types import RolloutStatus

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)

# After token 0: 3/4 for 0 and 1/4 for 1; after token 1: 1/2 each.
TABLE = torch.tensor([[LN3, 0.0], [0.0, 0.0]])


def two_rollouts() -> RolloutBatch:
    """Prompt 0, message 1 0, observation 1, message 1; and prompt 1 0, message 0."""
    return collate([episode((0,), (1, 0), (1,), (1,)), episode((1, 0), (0,))])


def batch_of_lengths(lengths: list[int], groups: list[int] | None = None) -> RolloutBatch:
    groups = groups or list(range(len(lengths)))
    return collate([episode((0,), (1,) * (n - 1), question=str(g)) for n, g in zip(lengths, groups, strict=True)])


def failed(batch: RolloutBatch, *rows: int) -> RolloutBatch:
    """The same rollouts, some of which ended in a failed search."""
    return collate(
        [
            replace(rollout, status=RolloutStatus.SEARCH_FAILED) if row in rows else rollout
            for row, rollout in enumerate(batch.rollouts)
        ]
    )


# Micro-batches.


def test_micro_batches_by_hand() -> None:
    batch = batch_of_lengths([2, 5, 3, 5, 2])
    # Longest first: 5 + 5 tokens fill a budget of 10; then 3, 2, 2, each padded to 3.
    assert micro_batches(batch, range(5), 10) == [[1, 3], [2, 0, 4]]
    assert micro_batches(batch, range(5), 9) == [[1], [3], [2, 0, 4]]
    assert micro_batches(batch, [4, 0, 2], 6) == [[2, 0], [4]]
    assert micro_batches(batch, range(5), 1) == [[1], [3], [2], [0], [4]]  # longer than the budget: one of its own


def test_rollouts_that_are_not_trained_need_no_pass() -> None:
    batch = failed(batch_of_lengths([2, 3, 4]), 1)
    assert micro_batches(batch, range(3), 100) == [[2, 0]]


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 90))
def test_micro_batches_keep_the_budget_and_split_nothing(lengths: list[int], budget: int) -> None:
    parts = micro_batches(batch_of_lengths(lengths), range(len(lengths)), budget)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= budget


# Mini-batches.


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 8), st.integers(0, 3))
def test_mini_batches_are_whole_groups_and_everything(groups: list[int], count: int, step: int) -> None:
    batch = batch_of_lengths([2] * len(groups), groups)
    blocks = mini_batches(batch, count, seed=0, step=step)
    assert sorted(row for block in blocks for row in block) == list(range(len(groups)))
    assert len(blocks) == min(count, len(set(groups)))
    members = [{groups[row] for row in block} for block in blocks]
    assert sum(map(len, members)) == len(set(groups))  # no group is in two of them
    assert max(map(len, members)) - min(map(len, members)) <= 1
    assert blocks == mini_batches(batch, count, seed=0, step=step)


def test_the_order_of_mini_batches_is_drawn_from_seed_and_step() -> None:
    batch = batch_of_lengths([2] * 32, [row // 2 for row in range(32)])
    orders = {str(mini_batches(batch, 4, seed, step)) for seed in range(3) for step in range(3)}
    assert len(orders) == 9


def test_mini_batches_without_a_trained_token_are_left_out() -> None:
    batch = failed(batch_of_lengths([2, 2, 2], [0, 1, 2]), 1)
    assert sorted(mini_batches(batch, 3, seed=0, step=1)) == [[0], [2]]
    assert mini_batches(failed(batch, 0, 1, 2), 3, seed=0, step=1) == []


# Log-probabilities.


@pytest.mark.parametrize("budget", [1, 8, 100])
def test_compute_logprobs_by_hand(budget: int) -> None:
    before = compute_logprobs(Bigram(TABLE), two_rollouts(), budget, temperature=1.0)
    three_to_one = LN4 - 0.75 * LN3  # entropy of 3/4, 1/4: 3/4 (ln 4 - ln 3) + 1/4 ln 4
    torch.testing.assert_close(
        before.logprobs, torch.tensor([[0, -LN4, -LN2, 0, -LN2], [0, 0, LN3 - LN4, 0, 0]], dtype=torch.float32)
    )
    torch.testing.assert_close(
        before.entropy, torch.tensor([[0, three_to_one, LN2, 0, LN2], [0, 0, three_to_one, 0, 0]])
    )
    assert before.reference is None
    assert not before.logprobs.requires_grad


def test_temperature_divides_the_logits() -> None:
    # At 1/2 the odds 3 : 1 become 9 : 1.
    before = compute_logprobs(Bigram(TABLE), two_rollouts(), 100, temperature=0.5)
    assert before.logprobs[0, 1].exp().item() == pytest.approx(0.1)
    assert before.logprobs[1, 2].exp().item() == pytest.approx(0.9)


def test_loss_inputs_belong_together() -> None:
    batch = two_rollouts()
    numbers = torch.arange(10.0).reshape(2, 5)
    before = BatchLogprobs(numbers + 10, numbers, reference=numbers + 20)
    size = LossNormalizer(tokens=7.0, rollouts=3)
    update = UpdateBatch(batch, numbers, numbers, before)
    inputs = loss_inputs(Bigram(TABLE), update, [1, 0], temperature=1.0, normalizer=size)
    torch.testing.assert_close(inputs.logprobs, torch.tensor([LN3 - LN4, -LN4, -LN2, -LN2]))
    assert inputs.logprobs.requires_grad
    assert inputs.advantages.tolist() == [7, 1, 2, 4]
    assert inputs.old_logprobs.tolist() == [17, 11, 12, 14]
    assert inputs.reference_logprobs is not None
    assert inputs.reference_logprobs.tolist() == [27, 21, 22, 24]
    assert (inputs.denominator, inputs.num_rollouts) == (7.0, 3)
    assert inputs.rollout_ids.tolist() == [1, 0, 0, 0]
    assert inputs.turn_ids.tolist() == [0, 0, 0, 1]


def test_the_size_of_a_mini_batch_counts_what_is_trained() -> None:
    batch = failed(batch_of_lengths([2, 4, 5]), 2)  # 1 and 3 trained tokens; the third rollout is not trained
    assert LossNormalizer.from_rows(batch, [2, 0, 1]) == LossNormalizer(tokens=4.0, rollouts=2)
    assert LossNormalizer.from_rows(batch, [1]) == LossNormalizer(tokens=3.0, rollouts=1)


# Curves.


def test_stability_metrics_by_hand() -> None:
    # Five tokens at 1/2, 1/4, 1/2, 1/4, 1/4 in a message of five; one at 1 in a message of one.
    batch = collate([episode((0,), (1, 1, 1, 1, 1)), episode((0,), (1,))])
    logprobs = torch.tensor([[0, -LN2, -LN4, -LN2, -LN4, -LN4], [0, 0, 0, 0, 0, 0]])
    entropy = torch.tensor([[0, 0.1, 0.2, 0.3, 0.4, 0.5], [0, 0.9, 0, 0, 0, 0]])
    metrics = stability_metrics(batch, BatchLogprobs(logprobs, entropy), garbled_perplexity=3.0)
    assert metrics == pytest.approx(
        {
            "stability/entropy": 2.4 / 6,
            "stability/perplexity": 2 ** (8 / 6),  # 8 factors of two over six tokens
            "stability/perplexity_max": 2 ** (8 / 5),  # 3.03; the message of one token is too short to judge
            "stability/garbled": 1 / 2,
            # The engine drew all at 1/4: off by ln 2 twice and by ln 4 once.
            "stability/sampler_drift_mean": 4 * LN2 / 6,
            "stability/sampler_drift_max": LN4,
        }
    )
    assert stability_metrics(batch, BatchLogprobs(logprobs, entropy), garbled_perplexity=3.04)["stability/garbled"] == 0


def test_stability_metrics_leave_out_failed_rollouts() -> None:
    batch = batch_of_lengths([6, 6])
    before = BatchLogprobs(torch.full((2, 6), -9.0), torch.zeros(2, 6))
    before.logprobs[0] = -1.0
    metrics = stability_metrics(failed(batch, 1), before, garbled_perplexity=50.0)
    assert metrics["stability/perplexity"] == pytest.approx(math.e)
    assert metrics["stability/perplexity_max"] == pytest.approx(math.e)
    assert metrics["stability/garbled"] == 0
    assert stability_metrics(failed(batch, 0), before, garbled_perplexity=50.0)["stability/garbled"] == 1
    assert stability_metrics(batch, before, garbled_perplexity=50.0)["stability/garbled"] == 1 / 2
    assert stability_metrics(failed(batch, 0, 1), before, garbled_perplexity=50.0) == {}


def test_garbled_rollouts_are_counted_once() -> None:
    batch = collate([episode((0,), (1,) * 4, (0,), (1,) * 4), episode((0,), (1,) * 4)])
    before = BatchLogprobs(torch.where(batch.turn_ids >= 0, -5.0, 0.0), torch.zeros_like(batch.sampled_logprobs))
    before.logprobs[1] = 0
    assert stability_metrics(batch, before, garbled_perplexity=50.0)["stability/garbled"] == 1 / 2


def test_message_perplexities_by_hand() -> None:
    # Row 0: turn 0 has four tokens at 1/2, turn 1 three. Row 1: turn 0 has four at 1, 1/4, 1, 1/4.
    turns = torch.tensor([[0, 0, 0, 0, -1, 1, 1, 1], [-1, 0, 0, 0, 0, -1, -1, -1]])
    logprobs = torch.full((2, 8), -LN2)
    logprobs[1] = torch.tensor([0, 0, -LN4, 0, -LN4, 0, 0, 0])
    expected = torch.tensor([[2, math.nan], [2, math.nan]])
    torch.testing.assert_close(message_perplexities(logprobs, turns, turns >= 0), expected, equal_nan=True)
    shorter = message_perplexities(logprobs, turns, turns >= 0, min_tokens=3)
    torch.testing.assert_close(shorter, torch.tensor([[2, 2], [2, math.nan]]), equal_nan=True)
