"""Diagnosis of rollouts that nothing can be learned from, with remedies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calibadv.batch import group_rollouts
from calibadv.interfaces import Protocol
from calibadv.types import Rollout, RolloutStatus

MIN_VALID = 0.1
"""Share of valid rollouts below which training has next to nothing to learn from."""

_FORMAT_REMEDIES: tuple[str, ...] = (
    "see what the model is given: calibadv prompt, with the same options",
    "teach it the format: calibadv demonstrate, then calibadv sft, and start from what calibadv export writes",
)
_TIE_REMEDIES: tuple[str, ...] = (
    "raise model.group_size or model.temperature, or give questions that are answered at times: calibadv predict "
    "--samples 8 --temperature 1 tells",
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Diagnosis of some rollouts.

    Attributes:
        step: rollout step.
        problems: what keeps training from learning, one phrase each.
        statuses: rollouts of each status.
        faults: what the rollouts that are not valid wrote instead.
        example: question, prompt and text of one of them, or of any.
        remedies: what to do next, one line each.
    """

    step: int
    problems: tuple[str, ...]
    statuses: dict[str, int]
    faults: dict[str, int]
    example: dict[str, str]
    remedies: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the entry of ``results.json``."""
        return asdict(self)


def diagnose(rollouts: Sequence[Rollout], protocol: Protocol, step: int) -> Diagnosis | None:
    """Say what keeps training from learning from some rollouts, None if nothing does."""
    included = [rollout for rollout in rollouts if rollout.included]
    problems, remedies = _format_problems(included), _FORMAT_REMEDIES
    if not problems:
        problems, remedies = _tie_problems(included), _TIE_REMEDIES
    if not problems:
        return None
    wrong = [rollout for rollout in included if not rollout.format_valid]
    statuses = _counts(str(rollout.status) for rollout in rollouts)
    faults = _counts(fault_of(rollout, protocol) for rollout in wrong)
    return Diagnosis(step, tuple(problems), statuses, faults, _example((wrong or included)[0]), remedies)


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _example(rollout: Rollout) -> dict[str, str]:
    text = "".join(segment.text for segment in rollout.segments)
    return {"question": rollout.question.question, "prompt": rollout.prompt, "text": text}


def _format_problems(rollouts: Sequence[Rollout]) -> list[str]:
    valid = sum(rollout.format_valid for rollout in rollouts)
    problems = [f"{valid} of {len(rollouts)} rollouts are valid"] if valid < MIN_VALID * len(rollouts) else []
    if rollouts and not any(rollout.num_searches for rollout in rollouts):
        problems.append("none searches")
    return problems


def _tie_problems(rollouts: Sequence[Rollout]) -> list[str]:
    groups = [{rollouts[row].score for row in rows} for rows in group_rollouts(rollouts) if len(rows) > 1]
    if not groups or any(len(scores) > 1 for scores in groups):
        return []
    return ["all rollouts of each question score the same, so that every advantage is 0"]


def fault_of(rollout: Rollout, protocol: Protocol) -> str:
    """Say what a rollout wrote that is not valid, by the first message that is not well formed."""
    messages = zip(rollout.policy_segments, rollout.messages, strict=True)
    text = next((segment.text for segment, message in messages if not message.well_formed), None)
    if text is None:
        return "no answer" if rollout.messages[-1].answer is None else "an answer without a search"
    if rollout.status is RolloutStatus.TRUNCATED:
        return "a message that is cut off"
    return _wrong_tags(text, protocol)


def _wrong_tags(text: str, protocol: Protocol) -> str:
    if not any(tag in text for tag in protocol.tags):
        return "no tag"
    ends = [text.partition(stop)[2].strip() for stop in protocol.stop_strings if stop in text]
    return "text after the action" if all(ends) and ends else "tags that are missing or in another order"
