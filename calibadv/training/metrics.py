"""The curves that rollouts and advantages give: pure functions from records and tensors to named numbers.

A curve without anything to average over in a batch is left out for that step, never logged as 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from calibadv.batch import RolloutBatch, answer_mask, group_rollouts
from calibadv.numerics.credit import penalized_search_turns
from calibadv.numerics.logprobs import message_perplexities
from calibadv.numerics.masked import turn_means
from calibadv.rewards.answer import f1
from calibadv.rewards.evidence import true_step_correctness
from calibadv.training.logprobs import BatchLogprobs
from calibadv.types import Metrics, Rollout, RolloutStatus

_UNFINISHED = (RolloutStatus.TRUNCATED, RolloutStatus.INVALID, RolloutStatus.OUT_OF_TURNS, RolloutStatus.SEARCH_FAILED)


def rollout_metrics(batch: RolloutBatch, estimated: Tensor, calibrated: Tensor) -> Metrics:
    """All curves of one rollout batch: ``reward/*``, ``rollout/*``, ``advantage/*`` and ``credit/*``."""
    return {
        **reward_metrics(batch.rollouts),
        **shape_metrics(batch.rollouts),
        **advantage_metrics(batch, estimated, "estimated"),
        **advantage_metrics(batch, calibrated, "calibrated"),
        **group_metrics(batch),
        **credit_metrics(batch, estimated),
    }


def reward_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """Means over the rollouts that have a reward, which those with a failed search have not."""
    scored = [rollout for rollout in rollouts if rollout.included]
    return _without_empty(
        {
            "reward/score": [rollout.score for rollout in scored],
            "reward/f1": [rollout.f1 for rollout in scored],
            "reward/em": [rollout.em for rollout in scored],
            "reward/answer_f1": [_answer_f1(rollout) for rollout in scored],
            "reward/format_valid": [rollout.format_valid for rollout in scored],
        }
    )


def _answer_f1(rollout: Rollout) -> float:
    return 0.0 if rollout.answer is None else f1(rollout.answer, rollout.question.golden_answers)


def shape_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """Compute the lengths and the ends of rollouts."""
    lengths = {
        "rollout/turns": [len(rollout.policy_segments) for rollout in rollouts],
        "rollout/searches": [rollout.num_searches for rollout in rollouts],
        "rollout/policy_tokens": [sum(s.num_tokens for s in rollout.policy_segments) for rollout in rollouts],
    }
    shares = {f"rollout/{status}": [rollout.status is status for rollout in rollouts] for status in _UNFINISHED}
    return _without_empty({**lengths, **shares})


def advantage_metrics(batch: RolloutBatch, advantages: Tensor, stage: str) -> Metrics:
    """Compute the positive and negative advantage of the policy's tokens."""
    answers = answer_mask(batch)
    metrics: Metrics = {}
    for part, mask in (("search", batch.loss_mask & ~answers), ("answer", answers)):
        chosen = advantages[mask].cpu().double()
        positive = chosen.clamp(min=0).sum().item() / len(batch.rollouts)
        negative = -chosen.clamp(max=0).sum().item() / len(batch.rollouts)
        prefix = f"advantage/{stage}/{part}"
        metrics |= {f"{prefix}/positive_mass": positive, f"{prefix}/negative_mass": negative}
        if negative:
            metrics[f"{prefix}/ratio"] = positive / negative
    return metrics


def group_metrics(batch: RolloutBatch) -> Metrics:
    """Silver documents of the groups that are trained, and how many have equal rewards."""
    rollouts = [batch.rollouts[row] for row in batch.included.nonzero().flatten().tolist()]
    groups = [[rollouts[row] for row in rows] for rows in group_rollouts(rollouts)]
    sizes = [len(group[0].silver) for group in groups]
    return _without_empty(
        {
            "credit/silver_size": sizes,
            "credit/empty_silver": [size == 0 for size in sizes],
            "credit/tied_groups": [len({r.score for r in group}) == 1 for group in groups if len(group) > 1],
        }
    )


def credit_metrics(batch: RolloutBatch, estimated: Tensor) -> Metrics:
    """Mean step correctness, and how many of the penalized searches had found evidence."""
    per_turn = turn_means(estimated, batch.turn_ids, batch.step_correctness.shape[1])
    penalized = penalized_search_turns(per_turn, batch.answer_turn.cpu()).numpy()
    found: list[float] = []
    silver: list[bool] = []
    gold: list[bool] = []
    for row in np.flatnonzero(batch.included.numpy(force=True)):
        rollout, negative = batch.rollouts[row], penalized[row]
        found.extend(value for value in rollout.step_correctness if value is not None)
        silver.extend(_correct(rollout.step_correctness, negative))
        if negative.any():
            gold.extend(_correct(true_step_correctness(rollout) or (), negative))
    return _without_empty(
        {"credit/step_correctness": found, "credit/mispenalised": silver, "credit/true_mispenalised": gold}
    )


def _correct(correctness: Sequence[float | None], chosen: Sequence[bool]) -> list[bool]:
    """Return for each chosen search turn that finds documents whether it found some that count."""
    return [value > 0 for value, is_chosen in zip(correctness, chosen, strict=False) if is_chosen and value is not None]


def evaluation_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """Compute the metrics of a validation or test: means over the questions, overall and per data source.

    Questions whose search failed have no result: they are in none of the means, and counted apart.
    """
    scored = [rollout for rollout in rollouts if rollout.included]
    metrics = _evaluate(scored, "")
    for source in sorted({rollout.question.data_source for rollout in scored} - {""}):
        metrics |= _evaluate([rollout for rollout in scored if rollout.question.data_source == source], f"{source}/")
    return {**metrics, "search_failed": float(len(rollouts) - len(scored))}


def without_result(metrics: Metrics) -> str:
    """Say that an evaluation's means are over fewer questions than were asked."""
    failed = metrics.get("search_failed", 0.0)
    return f"{failed:.0f} of {metrics['count'] + failed:.0f} questions have no result" if failed else ""


def _evaluate(rollouts: Sequence[Rollout], prefix: str) -> Metrics:
    means = _without_empty(
        {
            f"{prefix}score": [rollout.score for rollout in rollouts],
            f"{prefix}f1": [rollout.f1 for rollout in rollouts],
            f"{prefix}em": [rollout.em for rollout in rollouts],
            f"{prefix}cover_em": [rollout.cover_em for rollout in rollouts],
            f"{prefix}format_valid": [rollout.format_valid for rollout in rollouts],
            f"{prefix}searches": [rollout.num_searches for rollout in rollouts],
        }
    )
    return {**means, f"{prefix}count": float(len(rollouts))}


def _without_empty(columns: dict[str, Iterable[float]]) -> Metrics:
    """The mean of each column that has entries."""
    values = {name: list(column) for name, column in columns.items()}
    return {name: float(sum(column)) / len(column) for name, column in values.items() if column}


def speed_metrics(batch: RolloutBatch, seconds: dict[str, float]) -> Metrics:
    """Compute the speed of the two large stages of a step."""
    tokens = batch.loss_mask.sum().item()
    return {
        "rollout/seconds": seconds["rollout"],
        "rollout/tokens_per_second": tokens / seconds["rollout"],
        "update/seconds": seconds["update"],
    }


def stability_metrics(batch: RolloutBatch, old: BatchLogprobs, garbled_perplexity: float) -> Metrics:
    """Curves that tell whether training is stable, read off the policy before the update."""
    mask = batch.loss_mask
    if not mask.any():
        return {}
    logprobs = old.logprobs[mask]
    drift = (batch.sampled_logprobs[mask] - logprobs).abs()
    perplexities = message_perplexities(old.logprobs, batch.turn_ids, mask)
    garbled = (perplexities > garbled_perplexity).any(dim=1)  # nan is not larger
    judged = perplexities[~perplexities.isnan()]
    metrics = {} if judged.numel() == 0 else {"stability/perplexity_max": judged.max().item()}
    return {
        **metrics,
        "stability/entropy": old.entropy[mask].mean().item(),
        "stability/perplexity": (-logprobs.mean()).exp().item(),
        "stability/garbled": garbled[mask.any(dim=1)].float().mean().item(),
        "stability/sampler_drift_mean": drift.mean().item(),
        "stability/sampler_drift_max": drift.max().item(),
    }


class Stopwatch:
    """Collects seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # wall time of each stage, all its measurements so far added up

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Measure what runs inside."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
