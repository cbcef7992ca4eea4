"""DAPO's dynamic sampling: train on groups whose rewards differ."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from calibadv.errors import UserError
from calibadv.interfaces import GroupFilter
from calibadv.types import Rollout


class DynamicSampling(GroupFilter):
    """Drop groups whose rewards are all equal, which teach nothing, and ask other questions: DAPO (arXiv 2503.14476).

    Paper, equation 11: a group is dropped if none or all of its rollouts have a right answer. Rewards such as F1 have
    values in between; what leaves no advantage with them is that all are equal.

    Args:
        max_tries: How often a step asks further questions in the place of those dropped, as many each time as are
            missing. What is missing after the last time is filled with groups that were dropped.

    Raises:
        UserError: ``max_tries`` is below 1.
    """

    def __init__(self, max_tries: int = 5) -> None:
        if max_tries < 1:
            raise UserError(f"max_tries is {max_tries}; it must be at least 1 (without a filter nothing is dropped)")
        self.max_tries = max_tries

    @override
    def keep(self, group: Sequence[Rollout]) -> bool:
        return len({rollout.score for rollout in group if rollout.included}) > 1
