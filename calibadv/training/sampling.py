"""Sampling of scored groups: on all ranks, and again in the place of groups that a filter drops (dynamic sampling)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np

from calibadv.agent.episode import Agent
from calibadv.agent.patience import Waiting
from calibadv.agent.rollout import Draws, count_searches, run_rollouts
from calibadv.distributed import Attempt, ProcessGroup, raising_together
from calibadv.errors import RetrievalError, UserError, shown
from calibadv.interfaces import GroupFilter, Reward
from calibadv.policy.policy import Policy
from calibadv.rewards.evidence import credit_rollouts
from calibadv.rewards.scoring import score_rollouts
from calibadv.training.metrics import Stopwatch
from calibadv.types import Group, Metrics, Question, Rollout, RolloutStatus

# A retriever that fails this often is down; going on would train on what is left by chance. Fewer failures than the
# second number say little where rollouts are left: a policy that hardly searches would stop at its first one.
_MAX_FAILED_SHARE, _MIN_FAILED = 0.5, 3


@dataclass(slots=True)
class RolloutSampler:
    """Samples and scores rollouts with the policy as it is now.

    Attributes:
        agent: engine, environment, protocol and tokenizer.
        policy: model and tokenizer that the engine follows.
        reward: scores answers.
        engine_is_stale: whether the policy has changed since the engine was synchronized.
    """

    agent: Agent
    policy: Policy
    reward: Reward
    engine_is_stale: bool = True

    def sample_groups(
        self,
        questions: Sequence[Question],
        draws: Draws,
        processes: ProcessGroup,
        waiting: Waiting | None = None,
        timer: Stopwatch | None = None,
        credit: bool = True,
    ) -> list[Group]:
        """Sample and score the groups of some questions; each rank its own, then all ranks hold all of them."""
        timer = timer or Stopwatch()
        own = processes.attempt(partial(self._sample, questions, draws, processes, waiting, timer, credit))
        with timer.measure("evidence"):
            rollouts = own.result or []
            groups = [rollouts[start : start + draws.samples] for start in range(0, len(rollouts), draws.samples)]
            owners = processes.assign_ranks([question.id for question in questions])
            return processes.all_gather_in_order(Attempt(groups, own.error), owners)

    def _sample(
        self,
        questions: Sequence[Question],
        draws: Draws,
        processes: ProcessGroup,
        waiting: Waiting | None,
        timer: Stopwatch,
        credit: bool,
    ) -> list[Rollout]:
        with timer.measure("rollout"):
            if self.engine_is_stale:
                self.agent.engine.sync(self.policy)
                self.engine_is_stale = False
            rollouts = run_rollouts(questions, self.agent, draws, processes, waiting)
        with timer.measure("evidence"):
            scored = score_rollouts(rollouts, self.reward)
            return credit_rollouts(scored) if credit else scored


def collect_groups(
    questions: Sequence[Question],
    sample: Callable[[Sequence[Question]], list[Group]],
    group_filter: GroupFilter | None,
    replacements: Iterator[Question],
    step: int,
) -> tuple[list[Group], Metrics]:
    """Sample the groups of a rollout step, and replace those that the filter drops."""
    sampled: list[Group] = []

    def sample_checked(asked: Sequence[Question]) -> list[Group]:
        groups = sample(asked)
        sampled.extend(groups)
        with raising_together():
            # Of the whole step, since a few searches say little of the retriever.
            check_searches(chain.from_iterable(sampled), step)
        return groups

    groups = sample_checked(questions)
    if group_filter is None:
        return groups, {}
    return refill(groups, group_filter, replacements, sample_checked)


def refill(
    groups: Sequence[Group],
    group_filter: GroupFilter,
    replacements: Iterator[Question],
    sample: Callable[[list[Question]], Sequence[Group]],
) -> tuple[list[Group], Metrics]:
    """Replace the groups that a filter drops, until the batch is full or there were enough tries."""
    filled = list(groups)

    def keeps(group: Group) -> bool:
        return checked_verdict(group_filter.keep(group), group_filter, group[0].question.id)

    dropped = [index for index, group in enumerate(groups) if not keeps(group)]
    asked = len(groups)
    for _ in range(group_filter.max_tries):
        questions = list(islice(replacements, len(dropped)))
        if not questions:
            break
        asked += len(questions)
        for group in filter(keeps, sample(questions)):
            filled[dropped.pop(0)] = group
    return filled, {"filter/asked": float(asked), "filter/unreplaced": float(len(dropped))}


def checked_verdict(verdict: Any, group_filter: GroupFilter, question_id: str) -> bool:
    """Return the verdict of a filter on a group, if it is one."""
    if not isinstance(verdict, (bool, np.bool_)):
        raise UserError(
            f"{type(group_filter).__name__} returned {shown(verdict)} for the group of question '{question_id}'; "
            "keep returns True or False"
        )
    return bool(verdict)


def check_searches(rollouts: Iterable[Rollout], step: int) -> None:
    """Refuse to go on when the retriever is down: more than half of the searches of a step failed."""
    rollouts = list(rollouts)
    failed = sum(rollout.status is RolloutStatus.SEARCH_FAILED for rollout in rollouts)
    made = sum(map(count_searches, rollouts))
    if failed > _MAX_FAILED_SHARE * made and (failed >= _MIN_FAILED or failed == len(rollouts)):
        raise RetrievalError(
            f"{failed} of {made} searches of step {step} failed (limit: half of them); see the warnings above, and "
            "bring the retriever back before you resume"
        )
