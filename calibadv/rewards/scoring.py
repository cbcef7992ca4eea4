"""From a finished rollout to its reward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from calibadv.agent.protocol import parse_message
from calibadv.errors import UserError
from calibadv.interfaces import Reward
from calibadv.rewards.answer import cover_match, exact_match, f1
from calibadv.types import Rollout


def score_rollouts(rollouts: Iterable[Rollout], reward: Reward) -> list[Rollout]:
    """Score the answer of each rollout, gated by its status.

    ``answer`` and ``answer_score`` are those of the answer block, whatever the format; None where the last message has
    no answer. ``score``, ``f1``, ``em`` and ``cover_em`` are 0 unless the format is valid.

    Args:
        rollouts: episodes with their final status.
        reward: scores an answer in [0, 1].

    Returns:
        The same rollouts in the same order, with these fields set.

    Raises:
        UserError: the reward returned a value outside [0, 1].
    """
    return [_score(rollout, reward) for rollout in rollouts]


def _score(rollout: Rollout, reward: Reward) -> Rollout:
    last = parse_message(rollout.policy_segments[-1].text, rollout.prepend_think)
    if last.action != "answer":
        return replace(rollout, answer=None, answer_score=None, score=0.0, f1=0.0, em=0.0, cover_em=0.0)
    value = reward.score(last.content, rollout.question)
    if not 0 <= value <= 1:
        raise UserError(
            f"{type(reward).__name__} scored {value} on question '{rollout.question.id}'; a reward lies in [0, 1]"
        )
    golden = rollout.question.golden_answers
    valid = rollout.format_valid
    return replace(
        rollout,
        answer=last.content,
        answer_score=value,
        score=value if valid else 0.0,
        f1=f1(last.content, golden) if valid else 0.0,
        em=exact_match(last.content, golden) if valid else 0.0,
        cover_em=cover_match(last.content, golden) if valid else 0.0,
    )
