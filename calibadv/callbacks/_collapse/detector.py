"""Notices when a run begins to collapse, from its curves alone: no trainer is needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from calibadv.callbacks._collapse.rules import Limits, Rule, rules
from calibadv.types import Metrics

_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Alarm:
    """A curve beyond its limit.

    Attributes:
        curve: its name.
        value: what it is.
        limit: what it should have kept to.
        side: ``above``, ``below`` or, where that is too far, ``at``.
        step: the rollout step.
        meaning: what the limit is.
        acts: whether something is to be done, or only said.
        healthy_until: rollout steps after which the policy was last healthy by all rules; -1 for never.
    """

    curve: str
    value: float
    limit: float
    side: str
    step: int
    meaning: str
    acts: bool
    healthy_until: int = -1

    def __str__(self) -> str:
        """Say what is wrong, but for the step."""
        return f"{self.curve} is {self.value:.3g}, {self.side} its limit {self.limit:.3g} ({self.meaning})"


@dataclass(slots=True)
class _State:
    seen: list[float] = field(default_factory=list)
    past: list[float] = field(default_factory=list)
    within: int = 0
    beyond: int = 0
    spoken: bool = False
    good: int = -1


class Watch:
    """Follows the curves of one run. Each rule speaks once, and again only after its curve has recovered."""

    def __init__(self, limits: Limits) -> None:
        self.rules = rules(limits)
        self._states = {rule.curve: _State() for rule in self.rules}

    def observe(self, metrics: Metrics, step: int) -> list[Alarm]:
        """Look at what was measured."""
        alarms = [alarm for rule in self.rules if (alarm := self._judge(rule, metrics, step)) is not None]
        return [replace(alarm, healthy_until=self.healthy_until(step)) for alarm in alarms]

    def _judge(self, rule: Rule, metrics: Metrics, step: int) -> Alarm | None:
        if rule.curve not in metrics:
            return None
        state = self._states[rule.curve]
        state.seen = [*state.seen, metrics[rule.curve]][-rule.average :]
        if len(state.seen) < rule.average:
            return None
        value = fmean(state.seen)
        low, high = rule.bounds(state.past)
        if low <= value <= high or not rule.applies(metrics):  # what is not a number is beyond
            _recover(state, rule, value, step)
            return None
        state.within = 0
        state.beyond += 1
        if state.spoken or state.beyond < rule.patience:
            return None
        state.spoken = True
        side, limit = ("below", low) if value < low else ("above", high)
        limit = round(limit, _DIGITS)  # without the tolerance of its comparison, which is no figure for a reader
        return Alarm(rule.curve, value, limit, "at" if value == limit else side, step, rule.meaning, rule.acts)

    def healthy_until(self, step: int) -> int:
        """After how many rollout steps the policy was last healthy."""
        sick = [
            max(state.good - rule.lag, -1)
            for rule, state in zip(self.rules, self._states.values(), strict=True)
            if rule.acts and state.beyond
        ]
        return min([step, *sick])

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs to watch on."""
        return {curve: asdict(state) for curve, state in self._states.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Watch on."""
        self._states = {rule.curve: _State(**state_dict.get(rule.curve, {})) for rule in self.rules}


def _recover(state: _State, rule: Rule, value: float, step: int) -> None:
    state.past.append(value)
    state.beyond = 0
    state.within += 1
    state.good = step
    # Means of many steps change slowly, and would flicker around their limit.
    state.spoken = state.spoken and state.within < max(rule.patience, rule.average)
