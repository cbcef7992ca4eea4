"""Rewards: what an answer is worth, and which searches found its evidence."""

from calibadv.rewards.answer import F1, CoverMatch, ExactMatch, cover_match, exact_match, f1, normalise_answer
from calibadv.rewards.evidence import credit_rollouts, silver_documents, step_correctness, true_step_correctness
from calibadv.rewards.scoring import score_rollouts

__all__ = [
    "F1",
    "CoverMatch",
    "ExactMatch",
    "cover_match",
    "credit_rollouts",
    "exact_match",
    "f1",
    "normalise_answer",
    "score_rollouts",
    "silver_documents",
    "step_correctness",
    "true_step_correctness",
]
