from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.agents import ANSWER, SEARCH, Bigram, episode, play, scripted_agent
from support.training import accumulate, module_of, update
from torch import Tensor, nn

from calibadv.batch import LossInputs, RolloutBatch, collate
from calibadv.calibrators import AnswerRebalance, SoftPenalty
from calibadv.estimators import GRPO
from calibadv.interfaces import Regularizer
from calibadv.losses import PPOClip
from calibadv.policy.loading import enable_checkpointing, load_policy
from calibadv.policy.policy import Policy
from calibadv.rewards.answer import F1
from calibadv.rewards.evidence import credit_rollouts
from calibadv.rewards.scoring import score_rollouts
from calibadv.training.importance_sampling import TruncatedImportanceSampling
from calibadv.training.logprobs import BatchLogprobs, UpdateBatch, compute_logprobs
from calibadv.training.minibatches import micro_batches, mini_batches
from calibadv.training.objective import Objective
from calibadv.training.policy_module import Schedule
from calibadv.types import Metrics, Rollout, RolloutStatus

LN2 = math.log(2)


def ready(
    model: nn.Module, batch: RolloutBatch, advantages: Tensor | None = None, reference: Tensor | None = None
) -> UpdateBatch:
    """Advantages of plain GRPO, unless given."""
    old = replace(compute_logprobs(model, batch, 10_000, temperature=1.0), reference=reference)
    advantages = GRPO().estimate(batch) if advantages is None else advantages
    return UpdateBatch(batch, advantages, advantages, old)


# A loss for a pencil. All probabilities are 1/2, and the three tokens 1 after 0, 0 after 1 and 0 after 0 were drawn.


def tiny(reference: Tensor | None = None) -> tuple[Bigram, UpdateBatch]:
    batch = collate([episode((0,), (1, 0)), episode((0,), (0,))])
    # Ratios 3/2, 1/2 and 1.
    old = torch.tensor([[0, -LN2 - math.log(1.5), -LN2 + LN2], [0, -LN2, 0]])
    advantages = torch.tensor([[0, 1.0, -1.0], [0, 2.0, 0]])
    logprobs = BatchLogprobs(old, torch.zeros(2, 3), reference)
    return Bigram(torch.zeros(2, 2)), UpdateBatch(batch, advantages, advantages, logprobs)


def test_clipped_loss_by_hand() -> None:
    model, batch = tiny()
    metrics, gradient = accumulate(module_of(model), batch, [0, 1])
    # min(3/2, 6/5) = 6/5 and min(-1/2, -4/5) = -4/5 are clipped, 2 is not: -(6/5 - 4/5 + 2) / 3 = -4/5.
    assert metrics["loss"] == pytest.approx(-0.8)
    assert metrics["clip_high"] == metrics["clip_low"] == pytest.approx(1 / 3)
    # d = ln 3/2, -ln 2, 0: (2/3 + ln 3/2 - 1) + (2 - ln 2 - 1) + 0 = 2/3 + ln 3/4, over 3.
    assert metrics["kl_old"] == pytest.approx((2 / 3 + math.log(0.75)) / 3)
    # Only the third token has a gradient: -(1/3) x 2 x (1 - 1/2) at [0, 0], the opposite at [0, 1].
    torch.testing.assert_close(gradient, torch.tensor([-1 / 3, 1 / 3, 0, 0]))
    assert metrics["grad_norm"] == pytest.approx(2**0.5 / 3)


def test_tokens_without_advantage_count_in_the_denominator() -> None:
    model, batch = tiny()
    batch.advantages[0] = 0
    assert accumulate(module_of(model), batch, [0, 1])[0]["loss"] == pytest.approx(-2 / 3)
    assert accumulate(module_of(model), batch, [1])[0]["loss"] == pytest.approx(-2)  # a mini-batch has its own


def test_gradient_is_clipped_to_its_norm_and_reported_before() -> None:
    model, batch = tiny()
    metrics, gradient = accumulate(module_of(model, clip_norm=0.1), batch, [0, 1])
    assert gradient.norm().item() == pytest.approx(0.1, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(2**0.5 / 3)


class LogprobMean(Regularizer):
    """3 x the mean log-probability."""

    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        term = 3 * inputs.logprobs.sum() / inputs.denominator
        return term, {"term": term.item()}


class _Overwriting(Regularizer):
    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        return inputs.logprobs.sum() * 0, {"kl_old": 0.0}


def test_a_part_may_not_report_under_a_name_that_is_taken() -> None:
    first = torch.zeros(1, dtype=torch.int64)
    inputs = LossInputs(torch.zeros(1), torch.zeros(1), None, torch.ones(1), 1.0, first, first, 1)
    with pytest.raises(ValueError, match="_Overwriting reports the metric 'kl_old', which is taken"):
        Objective(PPOClip(), 0.0, (_Overwriting(),)).compute(inputs)


def test_kl_and_regularizers_are_added() -> None:
    # The reference has the three tokens at 1/4, 1/2, 1/2: k3 = 1/2 + ln 2 - 1 for the first, 0 for the others.
    model, batch = tiny(reference=torch.tensor([[0, -2 * LN2, -LN2], [0, -LN2, 0]]))
    metrics, gradient = accumulate(module_of(model, LogprobMean(), kl_coef=0.5), batch, [0, 1])
    kl = (LN2 - 0.5) / 3
    assert metrics["kl_reference"] == pytest.approx(kl)
    assert metrics["term"] == pytest.approx(-3 * LN2)
    assert metrics["loss"] == pytest.approx(-0.8 + 0.5 * kl - 3 * LN2)
    # KL: 1/2 x 1/3 x (1 - 1/2) at the first token, 1 after 0: 1/12 x (-1/2, 1/2). Term: 1 at each token, so row 0
    # gets (-1/2, 1/2) + (1/2, -1/2) = 0 and row 1, token 0, (1/2, -1/2).
    torch.testing.assert_close(gradient, torch.tensor([-1 / 3 - 1 / 24, 1 / 3 + 1 / 24, 1 / 2, -1 / 2]))


# What must not change the result.


@pytest.fixture(scope="module")
def policy(qwen2_folder: Path) -> Policy:
    return load_policy(str(qwen2_folder))


@pytest.fixture(scope="module")
def rollouts(policy: Policy) -> list[Rollout]:
    """Eight rollouts of two questions, of 4 to 100 tokens, some right, some wrong, some invalid."""
    wrong = ANSWER.replace("Prague", "Rome")
    film = SEARCH.replace("capital", "film")
    replies = {"a": [[SEARCH, ANSWER], [SEARCH, wrong], ["so"], [SEARCH, film, ANSWER]], "b": [[film, wrong], [ANSWER]]}
    played = play(scripted_agent(policy.tokenizer, replies), "a", "b", samples=4)
    return credit_rollouts(score_rollouts(played, F1()))


def perturbed(model: nn.Module, rollouts: Sequence[Rollout]) -> UpdateBatch:
    """Another advantage for each token, old and reference log-probabilities some way off."""
    batch = collate(rollouts)
    noise = torch.randn(3, *batch.token_ids.shape, generator=torch.Generator().manual_seed(0)) * batch.loss_mask
    old = compute_logprobs(model, batch, 10_000, temperature=1.0)
    return UpdateBatch(
        batch,
        estimated=noise[0],
        advantages=noise[0],
        old=replace(old, logprobs=old.logprobs + 0.2 * noise[1], reference=old.logprobs + 0.2 * noise[2]),
    )


def test_loss_and_gradient_do_not_depend_on_micro_batches(policy: Policy, rollouts: list[Rollout]) -> None:
    batch = perturbed(policy.model, rollouts)
    results = {}
    for budget in (10_000, 700, 1):
        number = len(micro_batches(batch.batch, range(8), budget))
        results[number] = accumulate(module_of(policy.model, kl_coef=0.3, micro_batch_tokens=budget), batch, range(8))
    assert sorted(results) == [1, 2, 8]
    metrics, gradient = results[1]
    assert gradient.abs().max() > 0.01
    for other_metrics, other in (results[2], results[8]):
        assert other_metrics == pytest.approx(metrics, abs=1e-5)
        torch.testing.assert_close(other, gradient, atol=1e-5, rtol=1e-5)


def test_loss_and_gradient_do_not_depend_on_the_order_of_rows(policy: Policy, rollouts: list[Rollout]) -> None:
    batch = perturbed(policy.model, rollouts)
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    assert batch.old.reference is not None
    old = BatchLogprobs(batch.old.logprobs[order], batch.old.entropy[order], batch.old.reference[order])
    advantages = batch.advantages[order]
    other = UpdateBatch(collate([rollouts[row] for row in order]), advantages, advantages, old)
    results = [accumulate(module_of(policy.model, kl_coef=0.3), b, range(8)) for b in (batch, other)]
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-5)


def test_failed_searches_change_nothing(policy: Policy, rollouts: list[Rollout]) -> None:
    lost = replace(rollouts[1], status=RolloutStatus.SEARCH_FAILED, score=0.7)
    with_lost, without = [*rollouts[:4], lost, *rollouts[4:]], rollouts
    results = []
    for played in (with_lost, without):
        batch = ready(policy.model, collate(played))
        results.append(accumulate(module_of(policy.model), batch, range(len(played))))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-5)


class Nothing(Regularizer):
    """Adds 0; its presence keeps the loop from leaving out the backward pass of any rollout."""

    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        return 0 * inputs.logprobs.sum(), {}


@pytest.mark.parametrize("without_advantage", [[1, 4, 6], [0, 1, 2, 3, 4, 5, 6, 7]], ids=["some", "all"])
def test_rollouts_without_advantage_need_no_backward_pass(
    policy: Policy, rollouts: list[Rollout], without_advantage: list[int]
) -> None:
    batch = perturbed(policy.model, rollouts)
    batch.advantages[without_advantage] = 0
    modules = (module_of(policy.model), module_of(policy.model, Nothing()))
    left_out, everything = (accumulate(module, batch, range(8)) for module in modules)
    assert left_out[0] == pytest.approx(everything[0], abs=1e-5)
    torch.testing.assert_close(left_out[1], everything[1], atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(policy: Policy, rollouts: list[Rollout]) -> None:
    short, long = rollouts[2], rollouts[3]
    alone, beside = (compute_logprobs(policy.model, collate(r), 10_000, 1.0).logprobs for r in ([short], [short, long]))
    assert beside.shape[1] > alone.shape[1]
    torch.testing.assert_close(beside[0, : alone.shape[1]], alone[0], atol=1e-5, rtol=0)


def test_a_fresh_policy_is_at_no_distance_from_itself(policy: Policy, rollouts: list[Rollout]) -> None:
    batch = ready(policy.model, collate(rollouts))
    batch = replace(batch, old=replace(batch.old, reference=batch.old.logprobs))
    metrics, gradient = accumulate(module_of(policy.model, kl_coef=10.0), batch, range(8))
    plain, expected = accumulate(module_of(policy.model), batch, range(8))
    assert metrics["kl_reference"] == pytest.approx(0, abs=1e-9)
    assert metrics["kl_old"] == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)
    assert metrics["loss"] == pytest.approx(plain["loss"], abs=1e-6)


# The update.


def group(*scores: float, question: str = "q") -> list[Rollout]:
    """One rollout per score; each has its own first token, 0 or 1, after the prompt 0."""
    return [
        episode((0,), (place % 2, 1), (0,), (1,), question=question, score=score) for place, score in enumerate(scores)
    ]


def test_what_was_rewarded_becomes_more_likely() -> None:
    model = Bigram(torch.zeros(2, 2))
    update(module_of(model), ready(model, collate(group(0.0, 1.0))))
    assert model.table[0, 1] > model.table[0, 0]


def test_one_optimizer_step_per_mini_batch() -> None:
    model = Bigram(torch.zeros(2, 2))
    batch = ready(model, collate([r for name in "abc" for r in group(0.0, 1.0, question=name)]))
    module = module_of(model, mini_batches=3)
    metrics = update(module, batch)
    (optimizer,) = module.trainer.optimizers
    assert optimizer.state[model.table]["step"] == 3
    assert metrics["stability/grad_norm_max"] >= metrics["stability/grad_norm"] > 0
    assert {"update/loss", "update/learning_rate", "credit/tied_updates"} <= set(metrics)


def test_distance_to_the_old_policy_is_that_of_the_last_mini_batch() -> None:
    models = [Bigram(torch.zeros(2, 2)), Bigram(torch.zeros(2, 2))]
    batch = ready(models[0], collate([*group(0.0, 1.0, question="a"), *group(0.0, 1.0, question="b")]))
    modules = [module_of(model, mini_batches=2) for model in models]
    metrics = update(modules[0], batch)
    # The first of the two starts at the old policy; the mean would be half of this.
    first, last = mini_batches(batch.batch, 2, modules[1].seed, step=1)
    assert accumulate(modules[1], batch, first)[0]["kl_old"] == 0
    (optimizer,) = modules[1].trainer.optimizers
    optimizer.step()
    expected = accumulate(modules[1], batch, last)[0]["kl_old"]
    assert metrics["stability/kl_old"] == pytest.approx(expected)
    assert expected > 1e-4


@pytest.mark.parametrize("scores", [(0.0, 0.0, 0.0), (0.7, 0.7), (1.0, 1.0)], ids=["all invalid", "equal", "all right"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_equal_rewards_give_no_gradient(scores: tuple[float, ...], calibrated: bool) -> None:
    status = RolloutStatus.INVALID if not any(scores) else RolloutStatus.ANSWERED
    batch = collate([replace(rollout, status=status) for rollout in group(*scores)])
    advantages = GRPO().estimate(batch)
    for calibrator in (SoftPenalty(), AnswerRebalance(1.0)) if calibrated else ():
        advantages, _ = calibrator.calibrate(batch, advantages)
    model = Bigram(torch.zeros(2, 2))
    metrics, gradient = accumulate(module_of(model), ready(model, batch, advantages), range(len(scores)))
    assert not gradient.any()
    assert metrics["loss"] == metrics["grad_norm"] == 0
    assert update(module_of(model), ready(model, batch, advantages))["credit/tied_updates"] == 1


@pytest.mark.parametrize("skip_tied", [False, True])
def test_a_tied_mini_batch_moves_the_policy_by_momentum_unless_it_is_skipped(skip_tied: bool) -> None:
    model = Bigram(torch.ones(2, 2))
    module = module_of(model, skip_tied=skip_tied)
    (optimizer,) = module.trainer.optimizers
    first = update(module, ready(model, collate(group(0.0, 1.0))))
    table, state = model.table.detach().clone(), copy.deepcopy(optimizer.state_dict())
    second = update(module, ready(model, collate(group(1.0, 1.0))), step=2)
    assert (first["credit/tied_updates"], second["credit/tied_updates"]) == (0, 1)
    assert torch.equal(model.table, table) == skip_tied
    unchanged = all(
        torch.equal(value, optimizer.state_dict()["state"][0][name]) for name, value in state["state"][0].items()
    )
    assert unchanged == skip_tied
    assert ("stability/grad_norm" in second) != skip_tied
    assert all(math.isfinite(value) for value in second.values())


def test_a_tied_mini_batch_is_not_skipped_where_another_term_acts() -> None:
    model = Bigram(torch.ones(2, 2))
    batch = collate(group(1.0, 1.0))
    tied = ready(model, batch, reference=torch.zeros_like(batch.loss_mask, dtype=torch.float32))
    metrics = update(module_of(model, skip_tied=True, kl_coef=0.5), tied)
    assert metrics["credit/tied_updates"] == 1
    assert not torch.equal(model.table, torch.ones(2, 2))


def test_only_the_tied_mini_batches_are_skipped() -> None:
    model = Bigram(torch.zeros(2, 2))
    module = module_of(model, mini_batches=3, skip_tied=True)
    (optimizer,) = module.trainer.optimizers
    played = [*group(0.0, 1.0, question="a"), *group(1.0, 1.0, question="b"), *group(0.0, 0.0, question="c")]
    assert update(module, ready(model, collate(played)))["credit/tied_updates"] == 2
    assert optimizer.state[model.table]["step"] == 1


def test_a_batch_in_which_every_search_failed_updates_nothing() -> None:
    model = Bigram(torch.ones(2, 2))
    batch = collate([replace(rollout, status=RolloutStatus.SEARCH_FAILED) for rollout in group(0.0, 1.0)])
    metrics = update(module_of(model), ready(model, batch))
    assert metrics == {"update/learning_rate": 0.1, "credit/tied_updates": 0.0}
    assert torch.equal(model.table, torch.ones(2, 2))


def test_a_group_of_one_is_trained_on_its_reward() -> None:
    model = Bigram(torch.zeros(2, 2))
    batch = ready(model, collate(group(0.5)))
    assert batch.advantages[batch.batch.loss_mask].tolist() == pytest.approx([0.5, 0.5, 0.5], abs=1e-5)
    assert accumulate(module_of(model), batch, [0])[0]["loss"] == pytest.approx(-0.5, abs=1e-5)


def test_an_answer_turn_without_tokens() -> None:
    right = episode((0,), (1, 1), (0,), (1,), score=1.0)
    empty = episode((0,), (0, 1), (0,), (), status=RolloutStatus.INVALID)
    batch = collate([right, empty])
    advantages = GRPO().estimate(batch)
    for calibrator in (SoftPenalty(), AnswerRebalance(1.0)):
        advantages, _ = calibrator.calibrate(batch, advantages)
    # Nothing negative stands in an answer turn, so there is nothing to balance and the right answer gets 0.
    assert advantages[0].tolist() == pytest.approx([0, 2**-0.5, 2**-0.5, 0, 0], abs=1e-5)
    model = Bigram(torch.zeros(2, 2))
    metrics = update(module_of(model), ready(model, batch, advantages))
    assert all(math.isfinite(value) for value in metrics.values())
    assert model.table[0, 1] > model.table[0, 0]


def test_ratio_to_the_engines_log_probabilities() -> None:
    # Each token was drawn at 1/4 and has 1/2 now: the ratio is 2, clipped to 6/5 where the advantage is positive.
    model, batch = Bigram(torch.zeros(2, 2)), collate(group(0.0, 1.0))
    metrics = update(module_of(model, old_logprobs="engine"), ready(model, batch))
    assert metrics["stability/clip_high"] == pytest.approx(1 / 2)
    # A = -+ 1/sqrt 2 on half of the tokens each: -(1/2)(2 (-1/sqrt 2) + 6/5 (1/sqrt 2)) = 0.4 / sqrt 2
    assert metrics["update/loss"] == pytest.approx(0.4 / 2**0.5, abs=1e-5)
    assert update(module_of(Bigram(torch.zeros(2, 2))), ready(model, batch))["stability/clip_high"] == 0


# The learning rate.


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "expected"),
    [
        ("constant", 0, 4, [8, 8, 8, 8, 8]),
        ("constant", 2, 4, [4, 8, 8, 8, 8]),
        ("constant", 4, 3, [2, 4, 6, 8, 8]),
        # 8 x (1 + cos(pi k / 4)) / 2 for k = 0 .. 4: the first step has the peak, the one after the last 0.
        ("cosine", 0, 4, [8, 4 + 2 * 2**0.5, 4, 4 - 2 * 2**0.5, 0]),
        # Two steps of warm-up, then k = 0, 1 of 2.
        ("cosine", 2, 4, [4, 8, 8, 4, 0]),
        ("cosine", 4, 4, [2, 4, 6, 8, 8]),
    ],
)
def test_learning_rate_by_hand(schedule: Any, warmup: int, steps: int, expected: list[float]) -> None:
    rate = Schedule(schedule, warmup, steps)
    assert [rate.at(step, 8.0) for step in range(1, 6)] == pytest.approx(expected)


def test_learning_rate_is_that_of_the_rollout_step() -> None:
    model = Bigram(torch.zeros(2, 2))
    batch = ready(model, collate([*group(0.0, 1.0, question="a"), *group(0.0, 1.0, question="b")]))
    module = module_of(model, learning_rate=0.8, schedule="cosine", rollout_steps=2, mini_batches=2)
    (optimizer,) = module.trainer.optimizers
    rates = [update(module, batch, step)["update/learning_rate"] for step in (1, 2, 3)]
    assert rates == pytest.approx([0.8, 0.4, 0.0])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_only_trained_parameters_are_optimised() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = module_of(model, betas=(0.8, 0.9), weight_decay=0.5).configure_optimizers()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    assert (optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["weight_decay"]) == ((0.8, 0.9), 0.5)


# Engine and trainer.


def drifted() -> UpdateBatch:
    """Two rollouts of which the trainer finds tokens 4, 2 and 1/2 times as likely as the engine did."""
    batch = collate([episode((0,), (1, 0)), episode((0,), (0,))])
    logprobs = torch.full((2, 3), -LN2) * batch.loss_mask
    sampled = logprobs - torch.tensor([[0, 2 * LN2, LN2], [0, -LN2, 0]])
    advantages = torch.tensor([[0, 1.0, -1.0], [0, 2.0, 0]])
    old = BatchLogprobs(logprobs, torch.zeros(2, 3))
    return UpdateBatch(replace(batch, sampled_logprobs=sampled), advantages, advantages, old)


@pytest.mark.parametrize(
    ("level", "expected", "cut"),
    [
        # min(4, 3), 2 and 1/2; one of three weights is cut.
        ("token", [[0, 3.0, -2.0], [0, 1.0, 0]], 1 / 3),
        # A rollout's weight is the product over its tokens: min(4 x 2, 3) and 1/2.
        ("sequence", [[0, 3.0, -3.0], [0, 1.0, 0]], 2 / 3),
    ],
)
def test_tokens_are_weighed_by_trainer_over_engine(level: Any, expected: list[list[float]], cut: float) -> None:
    corrected, metrics = TruncatedImportanceSampling(level, cap=3.0).apply(drifted())
    torch.testing.assert_close(corrected.advantages, torch.tensor(expected))
    weights = {"token": (3 + 2 + 0.5) / 3, "sequence": (3 + 3 + 0.5) / 3}[level]
    assert metrics == pytest.approx({"stability/sampler_weight": weights, "stability/sampler_weight_cut": cut})


def test_the_correction_scales_the_gradient() -> None:
    """All ratios are 1 here, so the loss is -(mean of the advantages), and its gradient follows the weights."""
    losses = []
    for correction in (None, TruncatedImportanceSampling("token", cap=3.0)):
        model = Bigram(torch.zeros(2, 2))
        losses.append(update(module_of(model, sampler_correction=correction), drifted())["update/loss"])
    assert losses == pytest.approx([-(1 - 1 + 2) / 3, -(3 - 2 + 1) / 3])


def test_a_cap_below_one_would_cut_an_exact_engine() -> None:
    with pytest.raises(ValueError, match=r"cap is 0\.5; it must be at least 1"):
        TruncatedImportanceSampling(cap=0.5)


def test_checkpointed_activations_change_no_gradient(qwen2_folder: Path, rollouts: list[Rollout]) -> None:
    results = []
    for checkpointing in (False, True):
        policy = load_policy(str(qwen2_folder))
        if checkpointing:
            enable_checkpointing(policy)
        results.append(accumulate(module_of(policy.model), perturbed(policy.model, rollouts), range(8)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-5)
