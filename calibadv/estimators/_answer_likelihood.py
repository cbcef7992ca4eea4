"""Likelihood of the golden answer, if the policy had to answer before a turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibadv.batch import RolloutBatch
from calibadv.distributed import SINGLE_PROCESS, ProcessGroup
from calibadv.numerics.masked import check_shapes
from calibadv.policy.policy import Policy
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.protocol.search import escape_tags
from calibadv.training.logprobs import compute_logprobs
from calibadv.types import Rollout


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """The first golden answer as the policy would write it at once."""

    frame: tuple[int, ...]  # token ids of an empty think and of the tag that opens the answer
    answer: tuple[int, ...]  # token ids of the answer itself, which are judged


def answer_tokens(rollout: Rollout, tokenizer: AgentTokenizer) -> AnswerTokens:
    """Encode ``<think> </think> <answer> golden``, the white space being that of the protocol's examples.

    What the environment has already written of it, the ``<think>``, is left out. Frame and answer are encoded apart, so
    that it is plain which tokens are the answer's.
    """
    opened = "" if rollout.prepend_think else "<think>"
    text = escape_tags(rollout.question.golden_answers[0], tokenizer.special_strings)
    return AnswerTokens(
        frame=tuple(tokenizer.encode(f"{opened} </think> <answer>")), answer=tuple(tokenizer.encode(f" {text}"))
    )


def answer_likelihoods(
    batch: RolloutBatch, policy: Policy, token_budget: int, processes: ProcessGroup = SINGLE_PROCESS
) -> Tensor:
    """Compute exp(mean log-probability of the golden answer's tokens) before each turn: [B, K]."""
    answers = [answer_tokens(rollout, policy.tokenizer) for rollout in batch.rollouts]
    starts = [list(_turn_starts(rollout)) for rollout in batch.rollouts]
    included = batch.included.tolist()
    probabilities = torch.zeros_like(batch.step_correctness)
    for turn in range(batch.step_correctness.shape[1]):
        rows = [row for row, places in enumerate(starts) if included[row] and turn < len(places)]
        if not rows:
            continue
        asked = _answer_prompts(batch, rows, [starts[row][turn] for row in rows], [answers[row] for row in rows])
        logprobs = compute_logprobs(policy.model, asked, token_budget, temperature=1.0, processes=processes).logprobs
        means = logprobs.sum(dim=1) / asked.loss_mask.sum(dim=1).clamp(min=1)
        probabilities[rows, turn] = means.exp()
    return probabilities


def turn_gains(probabilities: Tensor, answer_turn: Tensor) -> Tensor:
    """Compute what each search turn adds to the likelihood of the golden answer: [B, K], 0 elsewhere."""
    check_shapes("B K, B", probabilities, answer_turn)
    after = torch.cat([probabilities[:, 1:], torch.zeros_like(probabilities[:, :1])], dim=1)
    turns = torch.arange(probabilities.shape[1], device=answer_turn.device)
    return torch.where(turns < answer_turn[:, None], after - probabilities, 0.0)


def _turn_starts(rollout: Rollout) -> Iterator[int]:
    """Yield the number of tokens before each turn."""
    position = len(rollout.prompt_ids)
    for segment in rollout.segments:
        if segment.source == "policy":
            yield position
        position += segment.num_tokens


def _answer_prompts(
    batch: RolloutBatch, rows: Sequence[int], starts: Sequence[int], answers: Sequence[AnswerTokens]
) -> RolloutBatch:
    """The histories of some rollouts up to a turn, each continued by its golden answer; the answers are "trained"."""
    history = batch.token_ids.numpy(force=True)
    opened = [start + len(answer.frame) for start, answer in zip(starts, answers, strict=True)]
    ends = np.array([place + len(answer.answer) for place, answer in zip(opened, answers, strict=True)])
    token_ids = np.zeros((len(rows), int(ends.max())), dtype=np.int64)
    for place, (row, start, answer) in enumerate(zip(rows, starts, answers, strict=True)):
        token_ids[place, :start] = history[row, :start]
        token_ids[place, start : ends[place]] = answer.frame + answer.answer
    columns = np.arange(token_ids.shape[1])
    known = columns < ends[:, None]
    judged = known & (columns >= np.array(opened)[:, None])
    device = batch.token_ids.device
    mask = torch.from_numpy(judged).to(device)
    return RolloutBatch(
        rollouts=tuple(batch.rollouts[row] for row in rows),
        token_ids=torch.from_numpy(token_ids).to(device),
        attention_mask=torch.from_numpy(known).to(device),
        loss_mask=mask,
        turn_ids=mask.long() - 1,
        answer_turn=torch.zeros_like(batch.answer_turn[rows]),
        group_ids=batch.group_ids[rows],
        rewards=batch.rewards[rows],
        included=batch.included[rows],
        step_correctness=torch.zeros_like(batch.step_correctness[rows, :1]),
        finds_documents=torch.zeros_like(batch.finds_documents[rows, :1]),
        sampled_logprobs=torch.zeros(mask.shape, dtype=batch.sampled_logprobs.dtype, device=device),
    )
