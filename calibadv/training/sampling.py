"""Replacing the groups that a filter drops, until a batch is full or there were enough tries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from calibadv.errors import UserError, shown
from calibadv.interfaces import AdvantageEstimator, GroupFilter
from calibadv.types import Metrics, Question, Rollout

Group = list[Rollout]


def check_filter(group_filter: GroupFilter | None, estimator: AdvantageEstimator, group_size: int) -> None:
    """Refuse a filter that would drop what the method learns from, or everything."""
    if group_filter is None:
        return
    name = type(group_filter).__name__
    if group_size == 1:
        raise UserError(f"model.group_size is 1, and {name} compares the rollouts of a group; give at least 2")
    if estimator.learns_from_ties:
        raise UserError(
            f"{type(estimator).__name__} also learns from groups whose rewards are equal, as their searches differ, "
            f"and {name} would drop these; use one of the two"
        )


def refill(
    groups: Sequence[Group],
    group_filter: GroupFilter,
    spares: Iterator[Question],
    ask: Callable[[list[Question]], Sequence[Group]],
) -> tuple[list[Group], Metrics]:
    """Put other groups in the place of those that the filter drops."""
    filled = list(groups)

    def keeps(group: Group) -> bool:
        return checked_verdict(group_filter.keep(group), group_filter, group[0].question.id)

    dropped = [place for place, group in enumerate(groups) if not keeps(group)]
    asked = len(groups)
    for _ in range(group_filter.max_tries):
        questions = list(islice(spares, len(dropped)))
        if not questions:
            break
        asked += len(questions)
        for group in filter(keeps, ask(questions)):
            filled[dropped.pop(0)] = group
    return filled, {"filter/asked": float(asked), "filter/unreplaced": float(len(dropped))}


def checked_verdict(verdict: Any, group_filter: GroupFilter, question_id: str) -> bool:
    """See that a filter said yes or no."""
    if not isinstance(verdict, (bool, np.bool_)):
        raise UserError(
            f"{type(group_filter).__name__} returned {shown(verdict)} for the group of question '{question_id}'; "
            "keep returns True or False"
        )
    return bool(verdict)
