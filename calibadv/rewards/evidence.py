"""Evidence of searches: silver documents and step correctness (CalibAdv, arXiv 2604.18235)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from rapidfuzz.distance import Levenshtein

from calibadv.batch import group_rollouts
from calibadv.types import Rollout

SILVER_SCORE = 0.7
"""The least score of a rollout whose documents count as evidence."""
SIMILAR_THINK = 0.5
"""Thinks with more than this word-level similarity repeat each other."""


def silver_documents(group: Sequence[Rollout]) -> frozenset[str]:
    """Ids of the documents that the best rollouts of a group retrieved.

    Best are the valid rollouts whose score is the highest of the group and at least ``SILVER_SCORE``; the documents of
    all their turns count. The retrieved text of a right answer stands in for labels that most question sets lack.

    Args:
        group: scored rollouts of one question.

    Returns:
        Document ids; empty where no rollout is good enough.
    """
    valid = [rollout for rollout in group if rollout.format_valid]
    best = max((rollout.score for rollout in valid), default=0.0)
    if best < SILVER_SCORE:
        return frozenset()
    return frozenset(
        document.id
        for rollout in valid
        if rollout.score == best
        for documents in rollout.turn_documents
        for document in documents or ()
    )


def step_correctness(rollout: Rollout, silver: frozenset[str]) -> tuple[float | None, ...]:
    """Share of silver documents among what each search turn newly retrieved.

    For search turn t with the distinct documents D_t: (silver documents of D_t that no earlier turn retrieved) / |D_t|.
    It is 0 if an earlier turn shares more than one document with D_t, if the think repeats an earlier one, if D_t is
    empty, and throughout an invalid rollout.

    Args:
        rollout: an episode of the group.
        silver: document ids, of ``silver_documents``.

    Returns:
        One value in [0, 1] per search turn; None for a turn whose tools find no documents.
    """
    found = rollout.turn_documents
    turns = [frozenset(document.id for document in documents or ()) for documents in found]
    if not rollout.format_valid or not silver:
        return _where_found(found, [0.0] * len(turns))
    shares = _shares(turns, silver)
    if not any(shares[1:]):
        return _where_found(found, shares)  # nothing for a repetition to undo, so the thinks need not be read
    thinks = [message.think.split() for message in rollout.messages]
    for place, share in enumerate(shares):
        if share and _repeats(turns, thinks, place):
            shares[place] = 0.0
    return _where_found(found, shares)


def _where_found(found: Sequence[object | None], shares: Sequence[float]) -> tuple[float | None, ...]:
    return tuple(None if documents is None else share for documents, share in zip(found, shares, strict=True))


def _shares(turns: Sequence[frozenset[str]], wanted: frozenset[str]) -> list[float]:
    """The share of wanted documents among each turn's, those of earlier turns left out of the count."""
    seen: frozenset[str] = frozenset()
    shares = []
    for turn in turns:
        shares.append(len((turn - seen) & wanted) / len(turn) if turn else 0.0)
        seen |= turn
    return shares


def _repeats(turns: Sequence[frozenset[str]], thinks: Sequence[Sequence[str]], place: int) -> bool:
    """True if a turn shares documents, or its think, with an earlier one."""
    if any(len(turns[place] & earlier) > 1 for earlier in turns[:place]):
        return True
    similarity = partial(Levenshtein.normalized_similarity, thinks[place], score_cutoff=SIMILAR_THINK)  # 0.0 below it
    return any(similarity(other) > SIMILAR_THINK for other in thinks[:place])


def credit_rollouts(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Set the step correctness of scored rollouts, group by group.

    Args:
        rollouts: scored rollouts of any number of groups, in any order.

    Returns:
        The same rollouts in the same order, with ``silver`` and ``step_correctness`` set.
    """
    credited = list(rollouts)
    for rows in group_rollouts(rollouts):
        silver = silver_documents([rollouts[row] for row in rows])
        for row in rows:
            correctness = step_correctness(rollouts[row], silver)
            credited[row] = replace(rollouts[row], silver=silver, step_correctness=correctness)
    return credited


def true_step_correctness(rollout: Rollout) -> tuple[float | None, ...] | None:
    """Share of gold documents among what each search turn newly retrieved, from the labels of the question.

    Unlike ``step_correctness`` this looks at documents only, neither at validity nor at repetition: it measures
    what the estimate misses.

    Args:
        rollout: an episode.

    Returns:
        One value in [0, 1] per search turn; None where the question's metadata has neither ``supporting_ids`` nor
        ``supporting_titles``.
    """
    kind, labels = rollout.question.supporting()
    if not labels:
        return None
    found = rollout.turn_documents
    turns = [frozenset(getattr(document, kind) for document in documents or ()) for documents in found]
    return _where_found(found, _shares(turns, frozenset(labels)))
