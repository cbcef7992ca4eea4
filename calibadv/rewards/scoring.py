"""From a finished rollout to its reward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from calibadv.errors import UserError, is_number, naming_part, shown
from calibadv.interfaces import Reward
from calibadv.rewards.answer import cover_match, exact_match, f1
from calibadv.types import Question, Rollout


def score_rollouts(rollouts: Iterable[Rollout], reward: Reward) -> list[Rollout]:
    """Score the answer of each rollout, gated by its status.

    ``answer`` and ``answer_score`` are those of the answer block, whatever the format; None where the last message has
    no answer. ``score``, ``f1``, ``em`` and ``cover_em`` are 0 unless the format is valid.
    """
    return [_score(rollout, reward) for rollout in rollouts]


def _score(rollout: Rollout, reward: Reward) -> Rollout:
    answer = rollout.messages[-1].answer
    if answer is None:
        return replace(rollout, answer=None, answer_score=None, score=0.0, f1=0.0, em=0.0, cover_em=0.0)
    value = _ask(reward, answer, rollout.question)
    golden = rollout.question.golden_answers
    valid = rollout.format_valid
    return replace(
        rollout,
        answer=answer,
        answer_score=value,
        score=value if valid else 0.0,
        f1=f1(answer, golden) if valid else 0.0,
        em=exact_match(answer, golden) if valid else 0.0,
        cover_em=cover_match(answer, golden) if valid else 0.0,
    )


def _ask(reward: Reward, answer: str, question: Question) -> float:
    """An answer's score; no error becomes one."""
    advice = f" on question '{question.id}', answer {shown(answer)}; a reward scores any text that a policy may write"
    with naming_part(type(reward).__name__, advice):
        score = reward.score(answer, question)
    return checked_score(score, reward, question.id)


def checked_score(score: Any, reward: Reward, question_id: str) -> float:
    """See that a reward scored an answer."""
    if not (is_number(score) and 0 <= score <= 1):
        raise UserError(
            f"{type(reward).__name__} scored {shown(score)} on question '{question_id}'; a reward lies in [0, 1]"
        )
    return float(score)
