"""Rules of a healthy run, one per curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from statistics import median

from calibadv.errors import UserError
from calibadv.runs.summary import DROP, ROUNDING
from calibadv.types import Metrics

Bounds = tuple[float, float]
# A running median of fewer values is no measure of what is usual.
_LEAST_PAST = 10
# Ties among rollouts that succeed mean that the questions are learned; a score below this one says that they fail.
_SUCCESS = 0.5
_FAR = "far from its running median"
_JUMP = "far above its running median"
_WEAK = (
    "most groups have no silver documents, so a method that uses them, as CalibAdv does, will make no progress: start "
    "from a stronger policy"
)


@dataclass(frozen=True)
class Limits:
    """Limits beyond which a collapse begins; running medians are those of the last steps within limits."""

    score_drop: float = DROP
    """``val/f1`` so far below the best so far; 0.2 is the drop by which results.json counts a run as collapsed."""
    format_valid: float = 0.5
    """``val/format_valid`` or ``reward/format_valid`` below this, after it has been above."""
    tied_groups: float = 0.9
    """``credit/tied_groups`` above this while ``reward/score`` is below 0.5: groups tie because their rollouts fail."""
    kl_factor: float = 20.0
    """``stability/kl_old`` above this multiple of its running median, and above ``kl_floor``."""
    kl_floor: float = 0.05
    """``stability/kl_old`` below this is never an alarm, however small its median is."""
    turns_factor: float = 1.5
    """``rollout/turns`` above this multiple of its running median, or below the median divided by it."""
    entropy_factor: float = 3.0
    """``stability/entropy`` above this multiple of its running median, and above ``entropy_floor``."""
    entropy_floor: float = 1.0
    """``stability/entropy`` below this many nats is never an alarm."""
    perplexity_factor: float = 3.0
    """``stability/perplexity`` above this multiple of its running median."""
    garbled: float = 0.1
    """``stability/garbled`` above this."""
    empty_silver: float = 0.5
    """The mean of ``credit/empty_silver`` over ``window`` steps above this; it is told, and never acted on."""
    patience: int = 3
    """Curves of training speak after so many steps in a row beyond a limit, validations at once."""
    window: int = 20
    """Steps of the running medians, and of the mean of ``credit/empty_silver``."""

    def __post_init__(self) -> None:
        for name in (entry.name for entry in fields(self)):
            value, (low, high) = getattr(self, name), _RANGES.get(name, (1.0, math.inf))
            if not low <= value <= high:
                most = "" if high == math.inf else f" and at most {high:g}"
                raise UserError(f"the guard's limits.{name} is {value}; it must be at least {low:g}{most}")


_RANGES: dict[str, Bounds] = {
    **dict.fromkeys(("score_drop", "format_valid", "tied_groups", "garbled", "empty_silver"), (0.0, 1.0)),
    **dict.fromkeys(("kl_floor", "entropy_floor"), (0.0, math.inf)),
    "window": (_LEAST_PAST, math.inf),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One curve, and the bounds within which it is healthy.

    Attributes:
        curve: its name.
        bounds: the lowest and the highest healthy value, given all healthy ones so far.
        meaning: what the limit is, for the message.
        patience: steps in a row beyond the bounds before it speaks.
        average: what is judged is the mean of so many steps.
        lag: a value of step k tells of the policy after k - lag steps.
        acts: whether something is to be done, or only said.
        applies: whether a value beyond the bounds counts, given all curves of its step.
    """

    curve: str
    bounds: Callable[[Sequence[float]], Bounds]
    meaning: str
    patience: int = 1
    average: int = 1
    lag: int = 0
    acts: bool = True
    applies: Callable[[Metrics], bool] = field(default=lambda metrics: True)


def fall(drop: float) -> Callable[[Sequence[float]], Bounds]:
    """Bounds of a score that is to stay near its best, as ``summarize_run`` draws them: equal to the limit is below."""
    return lambda past: (math.nextafter(max(past) - drop + ROUNDING, math.inf) if past else -math.inf, math.inf)


def at_least(limit: float) -> Callable[[Sequence[float]], Bounds]:
    """Bounds of a share that should not fall; a policy that has never been above has nothing to lose."""
    return lambda past: (limit if max(past, default=-math.inf) >= limit else -math.inf, math.inf)


def at_most(limit: float) -> Callable[[Sequence[float]], Bounds]:
    """Bounds of a share that should be small."""
    return lambda past: (-math.inf, limit)


def no_jump(factor: float, floor: float, window: int) -> Callable[[Sequence[float]], Bounds]:
    """Bounds of a curve that may drift, but not jump up."""
    return lambda past: (-math.inf, max(factor * _usual(past, window), floor))


def near(factor: float, window: int) -> Callable[[Sequence[float]], Bounds]:
    """Bounds of a curve that may drift, but not jump up or down."""

    def bounds(past: Sequence[float]) -> Bounds:
        usual = _usual(past, window)
        return (usual / factor if usual < math.inf else -math.inf, usual * factor)

    return bounds


def _usual(past: Sequence[float], window: int) -> float:
    return median(past[-window:]) if len(past) >= _LEAST_PAST else math.inf


def rules(limits: Limits) -> list[Rule]:
    """Make the rules of a guard, one per curve.

    Curves of training are read off rollouts that the policy of the step before has sampled; only ``kl_old`` is of the
    step's own update.
    """
    wait, window = limits.patience, limits.window
    valid, valid_meaning = at_least(limits.format_valid), "above which it has been"
    entropy = no_jump(limits.entropy_factor, limits.entropy_floor, window)
    perplexity = no_jump(limits.perplexity_factor, 0.0, window)
    return [
        Rule("val/f1", fall(limits.score_drop), f"its best so far less {limits.score_drop:g}"),
        Rule("val/format_valid", valid, valid_meaning),
        Rule("reward/format_valid", valid, valid_meaning, wait, lag=1),
        Rule("credit/tied_groups", at_most(limits.tied_groups), "rollouts fail alike", wait, lag=1, applies=_fails),
        Rule("stability/kl_old", no_jump(limits.kl_factor, limits.kl_floor, window), _JUMP, wait),
        Rule("rollout/turns", near(limits.turns_factor, window), _FAR, wait, lag=1),
        Rule("stability/entropy", entropy, _JUMP, wait, lag=1),
        Rule("stability/perplexity", perplexity, _JUMP, wait, lag=1),
        Rule("stability/garbled", at_most(limits.garbled), "rollouts with noise in them", wait, lag=1),
        Rule("credit/empty_silver", at_most(limits.empty_silver), _WEAK, average=window, acts=False),
    ]


def _fails(metrics: Metrics) -> bool:
    return metrics.get("reward/score", 0.0) < _SUCCESS
