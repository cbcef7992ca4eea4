"""Why nothing can be learned from rollouts, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calibadv.batch import group_rollouts
from calibadv.interfaces import Protocol
from calibadv.types import Rollout, RolloutStatus

MIN_VALID = 0.1
"""Share of valid rollouts below which training has next to nothing to learn from."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong with some rollouts.

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
    if not included:
        return None
    valid = [rollout for rollout in included if rollout.format_valid]
    problems, remedies = [], []
    if len(valid) < MIN_VALID * len(included):
        problems.append(f"{len(valid)} of {len(included)} rollouts are valid")
    if not any(rollout.num_searches for rollout in included):
        problems.append("none searches")
    if problems:
        remedies += [
            "see what the model is given: calibadv prompt, with the same options",
            "teach it the format: calibadv demonstrate, then calibadv sft, and start from what calibadv export writes",
        ]
    if not problems and _all_tied(included):
        problems.append("all rollouts of each question score the same, so that every advantage is 0")
        remedies.append(
            "raise model.group_size or model.temperature, or give questions that are answered at times: "
            "calibadv predict --samples 8 --temperature 1 tells"
        )
    if not problems:
        return None
    faults = Counter(fault_of(rollout, protocol) for rollout in included if not rollout.format_valid)
    shown = next((rollout for rollout in included if not rollout.format_valid), included[0])
    return Diagnosis(
        step,
        tuple(problems),
        dict(Counter(str(rollout.status) for rollout in rollouts).most_common()),
        dict(faults.most_common()),
        {"question": shown.question.question, "prompt": shown.prompt, "text": "".join(s.text for s in shown.segments)},
        tuple(remedies),
    )


def _all_tied(rollouts: Sequence[Rollout]) -> bool:
    groups = [{rollouts[row].score for row in rows} for rows in group_rollouts(rollouts) if len(rows) > 1]
    return bool(groups) and all(len(scores) == 1 for scores in groups)


def fault_of(rollout: Rollout, protocol: Protocol) -> str:
    """Say what a rollout wrote that is not valid, by the first message that is not well formed."""
    policy = [segment.text for segment in rollout.segments if segment.source == "policy"]
    bad = next((n for n, message in enumerate(rollout.messages) if not message.well_formed), None)
    if bad is None:
        return "no answer" if rollout.messages[-1].answer is None else "an answer without a search"
    text = policy[bad]
    if rollout.status is RolloutStatus.TRUNCATED:
        return "a message that is cut off"
    if not any(tag in text for tag in protocol.tags):
        return "no tag"
    behind = min((text.partition(stop)[2] for stop in protocol.stop_strings if stop in text), key=len, default="")
    return "text after the action" if behind.strip() else "tags that are missing or in another order"
