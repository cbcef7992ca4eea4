from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agents import Bigram, episode
from support.training import HandFed, accumulate, module_of, update
from torch import Tensor
from torch.testing import assert_close

from calibadv.batch import LossInputs, collate
from calibadv.distributed import SINGLE_PROCESS
from calibadv.interfaces import PolicyLoss, Regularizer
from calibadv.losses import CISPO, GSPO, Aggregation, FixedLength, PPOClip, SequenceMean, TokenMean
from calibadv.losses.aggregation import check_length
from calibadv.numerics.kl import k1, k2, k3
from calibadv.numerics.losses import sequence_ratio
from calibadv.numerics.ratio import bounded_exponent
from calibadv.regularizers import LLDS
from calibadv.training.importance_sampling import truncated_weights
from calibadv.training.logprobs import BatchLogprobs, UpdateBatch, compute_logprobs
from calibadv.types import Metrics, Rollout

LN2 = math.log(2)


@dataclass
class Tokens:
    """The trained tokens of a mini-batch, in float64."""

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    rollouts: Tensor
    turns: Tensor

    def inputs(self, rows: Sequence[int]) -> LossInputs:
        """A micro-batch of some of the rollouts."""
        here = torch.isin(self.rollouts, torch.tensor(list(rows)))
        return LossInputs(
            logprobs=self.logprobs[here],
            old_logprobs=self.old[here],
            reference_logprobs=None,
            advantages=self.advantages[here],
            denominator=float(len(self.logprobs)),
            rollout_ids=self.rollouts[here],
            turn_ids=self.turns[here],
            num_rollouts=len(self.rollouts.unique()),
        )


def tokens(*rollouts: list[list[tuple[float, float]]], old: float = -3.0) -> Tokens:
    """Rollouts of turns of tokens, each given by logp - logp_old and its advantage."""
    flat = [(*token, r, t) for r, turns in enumerate(rollouts) for t, turn in enumerate(turns) for token in turn]
    changes, advantages, rows, turn_ids = zip(*flat, strict=True)
    olds = torch.full((len(flat),), old, dtype=torch.float64)
    return Tokens(
        logprobs=(olds + torch.tensor(changes, dtype=torch.float64)).requires_grad_(),
        old=olds,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        rollouts=torch.tensor(rows),
        turns=torch.tensor(turn_ids),
    )


def compute(
    part: PolicyLoss | Regularizer, batch: Tokens, blocks: Sequence[Sequence[int]] | None = None
) -> tuple[float, Tensor, Metrics]:
    """Value, gradient and metrics of a mini-batch that is cut into micro-batches."""
    leaf = batch.logprobs.detach().requires_grad_()
    total, value, metrics = replace(batch, logprobs=leaf), 0.0, {}
    for block in blocks or [batch.rollouts.unique().tolist()]:
        loss, reported = part.compute(total.inputs(block))
        loss.backward()
        value += loss.item()
        metrics = {name: metrics.get(name, 0.0) + reported[name] for name in reported}
    assert leaf.grad is not None
    return value, leaf.grad, metrics


def each(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Numbers by hand. Ratios are 3/2, 1/2, 5 and 1 unless said otherwise.

HALVES = [(math.log(1.5), 1.0), (-LN2, -1.0)]
HIGH = (math.log(5.0), -2.0)


def test_dual_clip_by_hand() -> None:
    batch = tokens([[*HALVES, HIGH, (0.0, -1.0)]])
    # min(3/2, 6/5), min(-1/2, -4/5), and of the punished token at ratio 5: -10, which the bound 3 lifts to -6; then -1.
    loss, gradient, metrics = compute(PPOClip(0.2, 0.2, dual_clip=3.0), batch)
    assert loss == pytest.approx(-(1.2 - 0.8 - 6 - 1) / 4)
    assert_close(gradient, each(0, 0, 0, 1 / 4))
    assert metrics == pytest.approx({"clip_high": 1 / 4, "clip_low": 1 / 4, "dual_clip": 1 / 4})
    loss, gradient, metrics = compute(PPOClip(0.2, 0.2), batch)
    assert loss == pytest.approx(-(1.2 - 0.8 - 10 - 1) / 4)
    assert_close(gradient, each(0, 0, 10 / 4, 1 / 4))
    assert "dual_clip" not in metrics


def test_cispo_by_hand() -> None:
    batch = tokens([[*HALVES, HIGH, (LN2, 0.0)]], old=-1.0)
    # Weights 3/2, 1/2 and min(5, 3), times A logp: 3/2 (ln 3/2 - 1), 1/2 (ln 2 + 1), 3 x -2 (ln 5 - 1), and 0.
    loss, gradient, metrics = compute(CISPO(clip_high=2.0), batch)
    assert loss == pytest.approx(-(1.5 * (math.log(1.5) - 1) + 0.5 * (LN2 + 1) - 6 * (math.log(5) - 1)) / 4)
    assert_close(gradient, each(-1.5 / 4, 0.5 / 4, 6 / 4, 0))
    assert metrics == {"clip_low": 0, "clip_high": 1 / 4}
    # With bounds 4/5 and 6/5; a token without advantage is not counted as cut.
    _, gradient, metrics = compute(CISPO(clip_low=0.2, clip_high=0.2), batch)
    assert_close(gradient, each(-1.2 / 4, 0.8 / 4, 2.4 / 4, 0))
    assert metrics == {"clip_low": 1 / 4, "clip_high": 2 / 4}


def test_gspo_by_hand() -> None:
    # Log-ratios ln 4 and 0: the mean is ln 2, so s = 2 for both tokens; in the other rollout 1/2.
    batch = tokens([[(math.log(4), 1.0)], [(0.0, -3.0)]], [[(-LN2, 2.0)]])
    loss, gradient, metrics = compute(GSPO(clip_low=0.9, clip_high=1.5), batch)
    assert loss == pytest.approx(-(2 * 1 + 2 * -3 + 0.5 * 2) / 3)
    assert_close(gradient, each(-2 / 3, 6 / 3, -1 / 3))  # each token follows its own advantage
    assert metrics == {"clip_low": 0, "clip_high": 0}
    # Clipped at 3/2: only where the advantage is positive. The rollout at 1/2 has a positive one and is not clipped.
    loss, gradient, metrics = compute(GSPO(clip_low=0.4, clip_high=0.5 - 1e-12), batch)
    assert loss == pytest.approx(-(1.5 * 1 + 2 * -3 + 0.5 * 2) / 3)
    assert_close(gradient, each(0, 6 / 3, -1 / 3))
    assert metrics == {"clip_low": 0, "clip_high": 1 / 3}


def test_aggregations_by_hand() -> None:
    # All ratios are 1: the loss weighs the advantages, 1 and 1 and 4 of one rollout, 3 of the other.
    batch = tokens([[(0.0, 1.0), (0.0, 1.0)], [(0.0, 4.0)]], [[(0.0, 3.0)]])
    found = {kind: compute(PPOClip(aggregation=kind), batch)[:2] for kind in (None, SequenceMean(), FixedLength(8))}
    (mean, by_token), (sequence, by_rollout), (fixed, by_length) = found.values()
    assert mean == pytest.approx(-(1 + 1 + 4 + 3) / 4)
    assert_close(by_token, -each(1, 1, 4, 3) / 4)
    assert sequence == pytest.approx(-((1 + 1 + 4) / 3 + 3) / 2)
    assert_close(by_rollout, -each(1 / 3, 1 / 3, 4 / 3, 3) / 2)
    assert fixed == pytest.approx(-(1 + 1 + 4 + 3) / (8 * 2))
    assert_close(by_length, -each(1, 1, 4, 3) / 16)


# Turn 0 has lost 0.3 - 0.1, turn 1 has won 0.2 - 0.1; then a punished turn, and a rollout without advantage.
MOVED = (
    [[(-0.3, 1.0), (0.1, 1.0)], [(-0.1, 1.0), (0.2, 1.0)], [(-0.4, -1.0)]],
    [[(-0.5, 0.0)]],
)


def test_llds_by_hand() -> None:
    loss, gradient, metrics = compute(LLDS(coef=0.6, gate="action"), tokens(*MOVED))
    # Of turn 0 the token that fell, 0.3; nothing of turn 1; nothing that was punished; 0.5 of the other rollout.
    assert loss == pytest.approx(0.6 * (0.3 + 0.5) / 6)
    assert_close(gradient, each(-0.1, 0, 0, 0, 0, -0.1))
    assert metrics == pytest.approx({"llds": 0.08, "llds_gated": 3 / 6})


def test_llds_per_response_by_hand() -> None:
    # The tokens that were not punished have lost 0.3 - 0.1 + 0.1 - 0.2 = 0.1 together: all that fell are pulled up.
    loss, gradient, metrics = compute(LLDS(coef=0.6, gate="response"), tokens(*MOVED))
    assert loss == pytest.approx(0.6 * (0.3 + 0.1 + 0.5) / 6)
    assert_close(gradient, each(-0.1, 0, -0.1, 0, 0, -0.1))
    assert metrics == pytest.approx({"llds": 0.09, "llds_gated": 5 / 6})
    # One that has risen by more closes the gate of its rollout.
    risen = [[*MOVED[0][0], (0.15, 1.0)], *MOVED[0][1:]]
    assert compute(LLDS(coef=0.6, gate="response"), tokens(risen, MOVED[1]))[0] == pytest.approx(0.6 * 0.5 / 7)


def test_a_punished_turn_does_not_open_the_gate_of_the_others() -> None:
    batch = tokens([[(-0.1, 1.0), (0.2, 1.0)], [(-9.0, -1.0)]])
    loss, gradient, metrics = compute(LLDS(gate="response"), batch)
    assert not gradient.any()
    assert (loss, metrics["llds_gated"]) == (0, 0)


def test_kl_estimators_by_hand() -> None:
    # d = ln 0.5 - ln 0.25 = ln 2, and 0
    policy, reference = each(0.5, 0.3).log(), each(0.25, 0.3).log()
    assert_close(k1(policy, reference), each(LN2, 0))
    assert_close(k2(policy, reference), each(LN2**2 / 2, 0))
    assert_close(k3(policy, reference), each(0.5 + LN2 - 1, 0))


# Log-ratios far beyond what float32 bears as an exponent, which is 88: the exponent is bounded to +-20.

E20 = math.exp(20)


def far(*changes: tuple[float, float]) -> Tokens:
    """A rollout of one turn in float32."""
    batch = tokens([list(changes)])
    old = batch.old.float()
    logprobs = (old + torch.tensor([change for change, _ in changes])).requires_grad_()
    return replace(batch, logprobs=logprobs, old=old, advantages=batch.advantages.float())


@pytest.mark.parametrize("change", [25.0, 90.0])
def test_far_ratios_by_hand(change: float) -> None:
    # A = 1 is clipped at 6/5; A = -2 weighs exp(20) and is pulled down by as much; A = 0 has no gradient.
    batch = far((change, 1.0), (change, -2.0), (change, 0.0), (0.0, 1.0))
    loss, gradient, _ = compute(PPOClip(0.2, 0.2), batch)
    assert loss == pytest.approx(-(1.2 - 2 * E20 + 0 + 1) / 4)
    assert_close(gradient, each(0, 2 * E20 / 4, 0, -1 / 4).float())
    # The bound of the dual clip, 3, leaves the punished one without gradient.
    loss, gradient, _ = compute(PPOClip(0.2, 0.2, dual_clip=3.0), batch)
    assert loss == pytest.approx(-(1.2 - 3 * 2 + 0 + 1) / 4)
    assert_close(gradient, each(0, 0, 0, -1 / 4).float())
    # CISPO's weight is cut at 5.
    _, gradient, _ = compute(CISPO(), batch)
    assert_close(gradient, -each(5 * 1, 5 * -2, 0, 1).float() / 4)
    # One rollout whose mean log-ratio is the change: its tokens have the ratio exp(20), and each its own advantage.
    loss, gradient, _ = compute(GSPO(), far((change, -2.0), (change, 0.0), (change, -1.0)))
    assert loss == pytest.approx(3 * E20 / 3)
    assert_close(gradient, each(2 * E20 / 3, 0, E20 / 3).float())


@pytest.mark.parametrize("change", [-25.0, -90.0])
def test_ratios_far_below_one_by_hand(change: float) -> None:
    loss, gradient, _ = compute(PPOClip(0.2, 0.2), far((change, 1.0), (change, -1.0), (change, 0.0)))
    assert loss == pytest.approx(-(1 / E20 - 0.8) / 3)
    assert_close(gradient, each(-1 / E20 / 3, 0, 0).float())


@pytest.mark.parametrize("difference", [-25.0, -90.0])
def test_k3_far_below_the_reference_pulls_back(difference: float) -> None:
    logprobs = torch.tensor([difference - 1.0], requires_grad=True)
    value = k3(logprobs, torch.tensor([-1.0]))
    (gradient,) = torch.autograd.grad(value.sum(), logprobs)
    assert value.item() == pytest.approx(math.expm1(20) + difference)
    assert gradient.item() == pytest.approx(1 - E20)  # a step against it raises logp


def test_k3_far_above_the_reference() -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    value = k3(logprobs, torch.tensor([-91.0]))
    (gradient,) = torch.autograd.grad(value.sum(), logprobs)
    assert (value.item(), gradient.item()) == pytest.approx((89.0, 1.0))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_weights_far_away(level: Any) -> None:
    changes = torch.tensor([[25.0, 90.0, 0.0], [-90.0, -90.0, 0.0]])
    mask = torch.tensor([[True, True, False]] * 2)
    capped = truncated_weights(changes, torch.zeros(2, 3), mask, level, cap=2.0)
    assert_close(capped, torch.tensor([[2.0, 2.0, 1.0], [1 / E20, 1 / E20, 1.0]]))
    assert truncated_weights(changes, torch.zeros(2, 3), mask, level, cap=math.inf).isfinite().all()


@given(st.floats(-20.0, 20.0, width=32))
def test_within_the_bounds_nothing_changes(log_ratio: float) -> None:
    """To the last bit, value and gradient."""
    bounded, plain = (torch.tensor([log_ratio], requires_grad=True) for _ in range(2))
    values = bounded_exponent(bounded).exp(), plain.exp()
    assert torch.equal(*values)
    assert torch.equal(*(torch.autograd.grad(v.sum(), x)[0] for v, x in zip(values, (bounded, plain), strict=True)))
    kls = k3(bounded, torch.zeros(1)), torch.expm1(-plain) + plain
    assert torch.equal(*kls)
    assert torch.equal(*(torch.autograd.grad(v.sum(), x)[0] for v, x in zip(kls, (bounded, plain), strict=True)))


# Against the formulas, written down again token by token.


def naive(
    batch: Tokens, aggregation: Aggregation | None, term: Callable[[int, list[int]], Tensor]
) -> Callable[[], Tensor]:
    """Minus the aggregated ``term``, a function of a token and of all tokens of its rollout."""
    members = [(batch.rollouts == row).nonzero().flatten().tolist() for row in batch.rollouts.unique()]

    def loss() -> Tensor:
        rows = [[term(token, row) for token in row] for row in members]
        if isinstance(aggregation, SequenceMean):
            return -torch.stack([torch.stack(row).mean() for row in rows]).mean()
        if isinstance(aggregation, FixedLength):
            return -torch.stack([torch.stack(row).sum() / aggregation.length for row in rows]).mean()
        return -torch.stack([value for row in rows for value in row]).mean()

    return loss


def naive_ppo(batch: Tokens, bound: float | None = None) -> Callable[[int, list[int]], Tensor]:
    def term(token: int, row: list[int]) -> Tensor:
        ratio, advantage = (batch.logprobs[token] - batch.old[token]).exp(), batch.advantages[token]
        value = min(ratio * advantage, torch.clamp(ratio, 0.7, 1.4) * advantage)
        return max(value, bound * advantage + 0 * ratio) if bound is not None and advantage < 0 else value

    return term


def naive_cispo(batch: Tokens) -> Callable[[int, list[int]], Tensor]:
    def term(token: int, row: list[int]) -> Tensor:
        ratio = math.exp((batch.logprobs[token] - batch.old[token]).item())
        return min(max(ratio, 0.7), 1.4) * batch.advantages[token] * batch.logprobs[token]

    return term


def naive_gspo(batch: Tokens) -> Callable[[int, list[int]], Tensor]:
    def term(token: int, row: list[int]) -> Tensor:
        changes = [(batch.logprobs[t] - batch.old[t]).item() for t in row]
        own = batch.logprobs[token]
        ratio = math.exp(sum(changes) / len(changes)) * (own - own.item()).exp()
        return min(ratio * batch.advantages[token], torch.clamp(ratio, 0.7, 1.4) * batch.advantages[token])

    return term


AGGREGATIONS: list[Aggregation | None] = [None, TokenMean(), SequenceMean(), FixedLength(7)]
LOSSES: dict[str, tuple[Callable[[Aggregation | None], PolicyLoss], Any]] = {
    "ppo": (lambda kind: PPOClip(0.3, 0.4, aggregation=kind), naive_ppo),
    "dual": (lambda kind: PPOClip(0.3, 0.4, 1.8, kind), lambda batch: naive_ppo(batch, 1.8)),
    "cispo": (lambda kind: CISPO(0.3, 0.4, kind), naive_cispo),
    "gspo": (lambda kind: GSPO(0.3, 0.4, kind), naive_gspo),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda kind: type(kind).__name__)


@st.composite
def batches(draw: st.DrawFn, spread: float = 0.6) -> Tokens:
    """One to six rollouts of one to three turns; every turn has its own advantage, which may be 0."""
    shape = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    changes = spread * torch.randn(sum(map(sum, shape)), generator=generator, dtype=torch.float64)
    taken = iter(changes.tolist())
    rollouts = []
    for turns in shape:
        levels = [draw(st.sampled_from([-1.5, -0.5, 0.0, 0.25, 1.0])) for _ in turns]
        rollouts.append([[(next(taken), level) for _ in range(n)] for n, level in zip(turns, levels, strict=True)])
    return tokens(*rollouts)


@every_loss
@every_aggregation
@settings(max_examples=15)
@given(batch=batches())
def test_losses_and_gradients_are_those_of_the_formula(
    name: str, aggregation: Aggregation | None, batch: Tokens
) -> None:
    make, formula = LOSSES[name]
    expected = naive(batch, aggregation, formula(batch))()
    (gradient,) = torch.autograd.grad(expected, batch.logprobs)
    value, found, _ = compute(make(aggregation), batch)
    assert value == pytest.approx(expected.item(), abs=1e-12)
    assert_close(found, gradient, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("gate", ["action", "response"])
@settings(max_examples=40)
@given(batch=batches())
def test_llds_and_its_gradient_are_those_of_the_formula(gate: Any, batch: Tokens) -> None:
    units: dict[tuple[int, int], list[int]] = {}
    for token, (row, turn) in enumerate(zip(batch.rollouts.tolist(), batch.turns.tolist(), strict=True)):
        if batch.advantages[token] >= 0:
            units.setdefault((row, turn if gate == "action" else 0), []).append(token)
    fallen = {unit: [batch.old[t] - batch.logprobs[t] for t in members] for unit, members in units.items()}
    pulled = [max(change, 0 * change) for changes in fallen.values() if sum(changes) > 0 for change in changes]
    expected = 0.1 * sum(pulled, 0 * batch.logprobs.sum()) / len(batch.logprobs)
    (gradient,) = torch.autograd.grad(expected, batch.logprobs)
    value, found, _ = compute(LLDS(gate=gate, tolerance=0.0), batch)
    assert value == pytest.approx(expected.item(), abs=1e-12)
    assert_close(found, gradient, atol=1e-12, rtol=1e-10)


# What must not change the result.


def cuts(batch: Tokens, seed: int) -> list[list[list[int]]]:
    """The rollouts in one part, in two and in as many as there are, in some order."""
    rows = batch.rollouts.unique()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))].tolist()
    middle = (len(rows) + 1) // 2
    return [[rows], [part for part in (rows[:middle], rows[middle:]) if part], [[row] for row in rows]]


PARTS: dict[str, Callable[[Aggregation | None], PolicyLoss | Regularizer]] = {
    **{name: make for name, (make, _) in LOSSES.items()},
    "llds": lambda _: LLDS(gate="action"),
    "llds response": lambda _: LLDS(gate="response"),
}


@pytest.mark.parametrize("name", PARTS)
@every_aggregation
@settings(max_examples=15)
@given(batch=batches(), seed=st.integers(0, 99))
def test_no_part_depends_on_how_a_mini_batch_is_cut(
    name: str, aggregation: Aggregation | None, batch: Tokens, seed: int
) -> None:
    part = PARTS[name](aggregation)
    whole, *others = (compute(part, batch, blocks) for blocks in cuts(batch, seed))
    for value, gradient, metrics in others:
        assert value == pytest.approx(whole[0], abs=1e-6)
        assert_close(gradient, whole[1], atol=1e-6, rtol=1e-6)
        assert metrics == pytest.approx(whole[2], abs=1e-6)


def module(loss: PolicyLoss, *regularizers: Regularizer, model: Bigram | None = None, **settings: Any) -> HandFed:
    """Two mini-batches per rollout step."""
    model = Bigram(torch.zeros(2, 2)) if model is None else model
    return module_of(model, *regularizers, **{"loss": loss, "weight_decay": 0.0, "mini_batches": 2, **settings})


def gradient_of(trained: HandFed, given: UpdateBatch) -> tuple[Metrics, Tensor]:
    metrics, gradient = accumulate(trained, given, range(len(given.batch.rollouts)))
    return metrics, gradient.view(2, 2)


def two_rollouts(advantages: list[list[float]], old: list[list[float]] | None = None) -> UpdateBatch:
    """Prompt 0 and messages 1 0 and 0, of a policy that has all tokens at 1/2."""
    batch = collate([episode((0,), (1, 0)), episode((0,), (0,))])
    before = torch.full((2, 3), -LN2) * batch.loss_mask if old is None else torch.tensor(old)
    given = torch.tensor(advantages)
    return UpdateBatch(batch, given, given, BatchLogprobs(before, torch.zeros(2, 3)))


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    # The first rollout has A = 1 and 2, the second A = 0: it needs no backward pass, and counts.
    [(TokenMean(), 3 / 3), (SequenceMean(), 1.5 / 2), (FixedLength(5), 3 / (5 * 2))],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("budget", [10_000, 1])
def test_rollouts_without_advantage_count(aggregation: Aggregation, expected: float, budget: int) -> None:
    ready = two_rollouts([[0, 1.0, 2.0], [0, 0, 0]])
    rule = module(PPOClip(aggregation=aggregation), micro_batch_tokens=budget)
    (mini_batch,) = rule.batching.cut(ready.batch, ready.advantages, 1, False, SINGLE_PROCESS)
    assert [(micro.rows, micro.needs_grad) for micro in mini_batch.micro_batches] == [([0], True), ([1], False)]
    metrics, gradient = gradient_of(rule, ready)
    assert metrics["loss"] == pytest.approx(-expected)
    # Token 1 after 0 with weight 1/3 of the sum, token 0 after 1 with 2/3; a probability of 1/2 halves them.
    assert_close(gradient, expected / 2 * torch.tensor([[1, -1], [-2, 2]]) / 3)


def test_a_rollout_without_advantage_is_pulled_on_by_llds() -> None:
    # The only token of the second rollout was at 1 and has fallen to 1/2.
    ready = two_rollouts([[0, 1.0, 2.0], [0, 0, 0]], old=[[0, -LN2, -LN2], [0, 0, 0]])
    plain, regularized = (gradient_of(module(PPOClip(), *terms), ready) for terms in ((), (LLDS(coef=0.3),)))
    assert regularized[0]["llds"] == pytest.approx(0.3 * LN2 / 3)
    assert regularized[0]["llds_gated"] == pytest.approx(1 / 3)
    assert regularized[0]["loss"] == pytest.approx(plain[0]["loss"] + 0.3 * LN2 / 3)
    assert_close(regularized[1] - plain[1], torch.tensor([[-0.05, 0.05], [0, 0]]))  # 0.3 / 3 x (1 - 1/2)


# What the methods promise.


@settings(max_examples=40)
@given(batch=batches(), spread=st.sampled_from([1e-4, 0.5]))
def test_gspo_of_rollouts_of_one_token_is_ppo(batch: Tokens, spread: float) -> None:
    single = replace(
        batch,
        logprobs=(batch.old + spread * (batch.logprobs.detach() - batch.old)).requires_grad_(),
        rollouts=torch.arange(len(batch.old)),
    )
    for kind in AGGREGATIONS:
        sequence, token = (compute(make(3e-4, 4e-4, aggregation=kind), single) for make in (GSPO, PPOClip))
        assert sequence[0] == pytest.approx(token[0], abs=1e-12)
        assert_close(sequence[1], token[1], atol=1e-12, rtol=1e-10)
        assert sequence[2] == token[2]


@given(batch=batches())
def test_with_one_advantage_gspo_has_the_gradient_of_the_ratio_of_the_rollout(batch: Tokens) -> None:
    same = torch.where(batch.rollouts % 2 == 0, 1.0, -0.5).double()
    batch = replace(batch, advantages=same)
    ratios = torch.stack([(batch.logprobs - batch.old)[batch.rollouts == row].mean().exp() for row in batch.rollouts])
    # For a rollout of n tokens the sum over its tokens is n s A.
    (expected,) = torch.autograd.grad((ratios * same).sum(), batch.logprobs)
    tokenwise = sequence_ratio(batch.logprobs, batch.old, batch.rollouts)
    assert_close(tokenwise, ratios)
    (found,) = torch.autograd.grad((tokenwise * same).sum(), batch.logprobs)
    assert_close(found, expected)


@given(batch=batches(spread=3.0), bound=st.sampled_from([1.5, 3.0]))
def test_dual_clip_bounds_what_a_punished_token_weighs(batch: Tokens, bound: float) -> None:
    _, gradient, _ = compute(PPOClip(0.2, 0.2, dual_clip=bound), batch)
    scaled = gradient * len(batch.old)
    assert (scaled.abs() <= bound * batch.advantages.abs() * (1 + 1e-9)).all()
    free = (batch.advantages >= 0) | ((batch.logprobs - batch.old) < math.log(bound))
    assert_close(gradient[free], compute(PPOClip(0.2, 0.2), batch)[1][free])


@given(batch=batches())
def test_cispo_has_the_gradient_of_ppo_where_nothing_is_cut_and_loses_none(batch: Tokens) -> None:
    _, gradient, _ = compute(CISPO(0.3, 0.4), batch)
    ratio = (batch.logprobs - batch.old).exp()
    inside = (ratio > 0.7) & (ratio < 1.4)
    assert_close(gradient[inside], compute(PPOClip(0.3, 0.4), batch)[1][inside])
    assert torch.equal(gradient != 0, batch.advantages != 0)


@pytest.mark.parametrize("gate", ["action", "response"])
@given(batch=batches(spread=1e-5), tolerance=st.sampled_from([1e-4, 1e-3]))
def test_rounding_opens_no_gate_of_llds(gate: Any, batch: Tokens, tolerance: float) -> None:
    """In the first mini-batch of a step nothing has changed, whatever the last bits of two forward passes say."""
    loss, gradient, metrics = compute(LLDS(gate=gate, tolerance=tolerance), batch)
    assert not gradient.any()
    assert loss == metrics["llds"] == metrics["llds_gated"] == 0


def test_rounding_beside_a_real_change_moves_nothing() -> None:
    # The sum over the turn is -0.3 + 1e-5; the token with the rounding is not pulled, the other as ever.
    _, gradient, metrics = compute(LLDS(coef=0.2), tokens([[(-0.3, 1.0), (-1e-5, 1.0)]]))
    assert_close(gradient, each(-0.1, 0))
    assert metrics["llds_gated"] == 1
    # Many roundings of one sign do not close the gate either.
    tail = [(5e-5, 1.0)] * 20
    assert compute(LLDS(), tokens([[(-5e-4, 1.0), *tail]]))[2]["llds_gated"] == 1


def test_llds_acts_from_the_second_mini_batch_on() -> None:
    def group(name: str) -> list[Rollout]:
        return [episode((0,), (place,), question=name, score=float(place)) for place in range(2)]

    batch = collate([*group("a"), *group("b")])
    updates = []
    for terms in ((), (LLDS(coef=10.0),)):
        model = Bigram(torch.tensor([[0.3, -0.2], [0.1, 0.4]]))
        before = compute_logprobs(model, batch, 10_000, 1.0)
        # In both groups token 1 is rewarded and token 0 has no advantage; after one update token 0 is rarer.
        advantages = batch.rewards[:, None] * batch.loss_mask
        given = UpdateBatch(batch, advantages, advantages, before)
        updates.append((update(module(PPOClip(), *terms, model=model), given), model.table.detach()))
    (plain, without), (regularized, with_llds) = updates
    assert regularized["stability/llds"] > 0
    assert regularized["stability/grad_norm_max"] > 2 * plain["stability/grad_norm_max"]
    assert with_llds[0, 0] > without[0, 0]


# The KL to the reference.

POLICY = torch.tensor([0.9, -0.4, 0.1], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([-0.3, 0.5, 0.2], dtype=torch.float64), 0)


def mean_gradient(estimate: Callable[[Tensor, Tensor], Tensor], reference: Tensor = REFERENCE) -> Tensor:
    """Of the estimate as a term of the loss, over what the policy draws."""
    logits = POLICY.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    (gradient,) = torch.autograd.grad((logprobs.exp().detach() * estimate(logprobs, reference)).sum(), logits)
    return gradient


def test_what_the_kl_estimators_pull_towards() -> None:
    logits = POLICY.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    forward, backward = (logprobs.exp() * (logprobs - REFERENCE)).sum(), -(REFERENCE.exp() * logprobs).sum()
    assert_close(mean_gradient(k2), torch.autograd.grad(forward, logits, retain_graph=True)[0])
    assert_close(mean_gradient(k3), torch.autograd.grad(backward, logits)[0])
    assert_close(mean_gradient(k1), torch.zeros(3, dtype=torch.float64))
    assert mean_gradient(k2).norm() > 0.1


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    # The first of three tokens is at 1/2, and at 1/4 in the reference: d = ln 2. The others agree.
    [("k1", LN2, 1.0), ("k2", LN2**2 / 2, LN2), ("k3", LN2 - 0.5, 0.5)],
)
def test_the_objective_takes_the_estimator_that_is_named(estimator: Any, value: float, slope: float) -> None:
    ready = two_rollouts([[0, 0, 0], [0, 0, 0]])
    reference = torch.tensor([[0, -2 * LN2, -LN2], [0, -LN2, 0]])
    ready = replace(ready, old=replace(ready.old, reference=reference))
    metrics, gradient = gradient_of(module(PPOClip(), kl_coef=0.5, kl_estimator=estimator), ready)
    assert metrics["kl_reference"] == pytest.approx(value / 3)
    assert metrics["loss"] == pytest.approx(0.5 * value / 3)
    if estimator != "k1":  # only the token that differs is pulled down; k1 pulls down all
        assert_close(gradient, 0.5 * slope / 3 * torch.tensor([[-0.5, 0.5], [0, 0]]))
    else:
        assert_close(gradient, 0.5 / 3 * torch.tensor([[0.0, 0.0], [0.5, -0.5]]))


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPOClip(dual_clip=1.0), r"dual_clip is 1\.0; it must be above 1, as in 3\.0"),
        (lambda: PPOClip(dual_clip=math.nan), "dual_clip is nan"),
        (lambda: CISPO(clip_high=0.0), r"clip_high is 0\.0; it must be above 0"),
        (lambda: GSPO(clip_low=-1.0), r"clip_low is -1\.0; it must lie in \(0, 1\]"),
        (lambda: FixedLength(0), "length of FixedLength is 0; it must be at least 1"),
        (lambda: LLDS(coef=0.0), r"coef of LLDS is 0\.0; it must be above 0"),
        (lambda: LLDS(tolerance=-1e-4), r"tolerance of LLDS is -0\.0001; it must be at least 0"),
        (lambda: module(PPOClip(), LLDS(), old_logprobs="engine"), "old_logprobs is engine and LLDS .* to trainer"),
        (lambda: module(PPOClip(), LLDS(), mini_batches=1), "mini_batches is 1 and LLDS .* at least 2"),
        (lambda: module(PPOClip(), LLDS(), LLDS(0.3)), "model.regularizers names LLDS 2 times; keep one"),
        (lambda: module(PPOClip(), kl_estimator="k2"), "kl_estimator is k2 and model.kl_coef is 0.* set kl_coef"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "warnings"),
    [
        (lambda: GSPO(clip_high=0.2), ["the clips of GSPO are 0.0003 and 0.2: .* 3e-4 and 4e-4"]),
        (GSPO, []),
        (lambda: module(PPOClip(), kl_coef=0.1, kl_estimator="k1"), ["model.kl_estimator is k1: .*; k2 and k3 do"]),
        (lambda: module(PPOClip(), kl_coef=0.1, kl_estimator="k2"), []),
        (
            lambda: module(PPOClip(clip_high=0.28), mini_batches=1),
            ["model.mini_batches is 1, .* this PPOClip behaves"],
        ),
        (
            lambda: module(PPOClip(dual_clip=3.0), mini_batches=1),
            ["model.mini_batches is 1, .* this PPOClip behaves"],
        ),
        (
            lambda: module(CISPO(), mini_batches=1),
            ["model.mini_batches is 1, .* this CISPO behaves"],
        ),
        (
            lambda: module(GSPO(), mini_batches=1),
            ["model.mini_batches is 1, .* this GSPO behaves"],
        ),
        (lambda: module(GSPO(), mini_batches=2), []),
        (lambda: module(GSPO(), mini_batches=1, old_logprobs="engine"), []),
        (lambda: module(PPOClip(aggregation=SequenceMean()), mini_batches=1), []),
        (lambda: check_length(PPOClip(aggregation=FixedLength(144)), 2500), ["the length of FixedLength is 144, and"]),
        (lambda: check_length(PPOClip(aggregation=FixedLength(144)), 144), []),
        (lambda: check_length(PPOClip(), 2500), []),
    ],
)
def test_what_will_hardly_work_is_warned_of(
    make: Callable[[], object], warnings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        make()
    assert len(caplog.messages) == len(warnings)
    for message, expected in zip(caplog.messages, warnings, strict=True):
        assert re.match(expected, message)
