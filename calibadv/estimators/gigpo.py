"""Group-in-group policy optimization: compare turns that start from the same state."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch, group_rollouts
from calibadv.estimators._broadcast import broadcast_turn_values
from calibadv.estimators._validation import check_gamma, check_weight
from calibadv.interfaces import AdvantageEstimator
from calibadv.numerics.advantages import anchor_advantages, group_centre, group_normalise
from calibadv.types import Rollout


class GiGPO(AdvantageEstimator):
    """Compare rollouts, and within the group the turns that start from the same state: GiGPO (arXiv 2505.10978).

    A turn gets A_episode + step_weight x A_step. A_episode compares the rewards of the group, as GRPO does. A_step
    compares the returns gamma^(T - t) R of the turns that start from one *anchor state*, T being the answer turn; a
    state that only one turn starts from gives 0. The state is the question and the set of documents that the last
    search found; public code compares texts instead. All first turns of a group share one state.

    Args:
        step_weight: Weight of the step part; 0 leaves the episode part alone.
        gamma: Discount of the reward for each turn between a turn and the answer (public code: 0.95, or 0.9).
        divide_by_std: Divide both parts by their standard deviations, as GRPO does, or only subtract the means.
    """

    def __init__(self, step_weight: float = 1.0, gamma: float = 0.95, divide_by_std: bool = True) -> None:
        check_weight("step_weight", step_weight)
        check_gamma(gamma)
        self.step_weight = step_weight
        self.gamma = gamma
        self.divide_by_std = divide_by_std

    @override
    def estimate(self, batch: RolloutBatch) -> Tensor:
        rewards = batch.rewards.cpu().double()
        compare = group_normalise if self.divide_by_std else group_centre
        episode = compare(rewards, batch.group_ids, batch.included)
        step = anchor_advantages(
            rewards, batch.answer_turn, batch.group_ids, anchor_ids(batch), self.gamma, self.divide_by_std
        )
        return broadcast_turn_values(episode[:, None] + self.step_weight * step, batch)


def anchor_ids(batch: RolloutBatch) -> Tensor:
    """Number the states that turns start from, within each group.

    The state before a turn is the set of documents that the last observation showed, or its text where its tools find
    none; before the first turn it is one and the same.
    """
    anchors = np.full(batch.step_correctness.shape, -1, dtype=np.int64)
    included = batch.included.tolist()
    for rows in group_rollouts(batch.rollouts):
        numbers: dict[object, int] = {}
        for row in rows:
            if included[row]:
                for turn, state in enumerate(_states(batch.rollouts[row])):
                    anchors[row, turn] = numbers.setdefault(state, len(numbers))
    return torch.from_numpy(anchors).to(batch.group_ids.device)


def _states(rollout: Rollout) -> Iterator[object]:
    """Yield the state before each turn."""
    yield None
    for segment in rollout.segments[1:-1]:
        if segment.source == "environment":
            found = segment.documents
            yield segment.text if found is None else frozenset(document.id for document in found)
