"""What a corpus and a retriever can give to questions at best, before anything is trained on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calibadv.errors import UserError
from calibadv.interfaces import Retriever
from calibadv.io.progress_bar import blocks, progress_bar
from calibadv.retrieval.corpus.base import searchable_text
from calibadv.retrieval.outcomes import search_outcomes, unwrap
from calibadv.rewards.answer import normalise_answer
from calibadv.types import Document, Question, ScoredDocument

# From this many on, reading takes longer than about two seconds, so a progress bar is shown.
_MANY_DOCUMENTS = 20_000
# Questions that are searched for at a time; a slow retriever still shows progress.
_BATCH = 64


@dataclass(frozen=True, slots=True)
class CoverageAudit:
    """What was found for a set of questions.

    Attributes:
        questions: how many there are.
        answer_coverage: share of the questions one of whose gold answers occurs in the corpus; None where the corpus is
            out of reach.
        labelled: questions that name their supporting documents, which ``recall`` is the mean over.
        recall: mean share of the supporting documents among the first k, by k; None where ``labelled`` is 0.
    """

    questions: int
    answer_coverage: float | None
    labelled: int
    recall: dict[int, float | None]


def audit_coverage(
    questions: Sequence[Question], corpus: Sequence[Document] | None, retriever: Retriever, top_k: Sequence[int]
) -> CoverageAudit:
    """Measure how much of what questions need is in the corpus, and how much of that a retriever finds.

    Each question is searched for once, as it is asked. The corpus is read once, whatever its size.
    """
    if not top_k or min(top_k) < 1:
        raise UserError(f"top_k is {list(top_k)}; give one or more numbers, each at least 1")
    gold = [(question, labels) for question in questions if (labels := supporting_labels(question))]
    shares: dict[int, list[float]] = {k: [] for k in top_k}
    for batch in blocks(gold, _BATCH, "Searching", hidden=len(gold) <= _BATCH):
        found = unwrap(search_outcomes(retriever, [question.question for question, _ in batch], max(top_k)))
        for (_, labels), hits in zip(batch, found, strict=True):
            for k in shares:
                shares[k].append(len(labels & _labels_of(hits[:k])) / len(labels))
    return CoverageAudit(
        questions=len(questions),
        answer_coverage=None if corpus is None else answer_coverage(questions, corpus),
        labelled=len(gold),
        recall={k: sum(values) / len(values) if values else None for k, values in shares.items()},
    )


def answer_coverage(questions: Sequence[Question], corpus: Sequence[Document]) -> float:
    """Share of questions one of whose gold answers occurs in a corpus, in a title or a text.

    Answer and document are normalised as answers are for scoring, and the answer must occur as whole words. An answer
    that normalises to nothing occurs nowhere. That an answer occurs does not make it known: ``yes`` and ``no`` occur
    almost surely, and so does a small number. One pass reads the corpus, and looks only for what was not found yet.
    """
    wanted = [
        {answer for golden in question.golden_answers if (answer := normalise_answer(golden))} for question in questions
    ]
    # By the longest word, which is likely the rarest: only where it occurs is the answer looked for.
    missing: dict[str, set[str]] = defaultdict(set)
    for answers in wanted:
        for answer in answers:
            missing[max(answer.split(), key=len)].add(answer)
    found: set[str] = set()
    hidden = len(corpus) < _MANY_DOCUMENTS
    with progress_bar("Looking for the answers", len(corpus), hidden) as advance:
        for document in corpus:
            if not missing:
                break
            found |= _take_found(missing, normalise_answer(searchable_text(document)))
            advance(1)
    return sum(not answers.isdisjoint(found) for answers in wanted) / len(questions)


def _take_found(missing: dict[str, set[str]], text: str) -> set[str]:
    """Take out of ``missing`` what occurs in a normalised text, and return it."""
    padded = f" {text} "
    found = set()
    for word in missing.keys() & text.split():
        here = {answer for answer in missing[word] if f" {answer} " in padded}
        found |= here
        missing[word] -= here
        if not missing[word]:
            del missing[word]
    return found


def supporting_labels(question: Question) -> frozenset[tuple[str, str]]:
    """What the documents that support a question are known by."""
    for kind in ("id", "title"):
        labels: Any = question.metadata.get(f"supporting_{kind}s")
        if labels and not isinstance(labels, list):
            raise UserError(
                f"question '{question.id}' has {labels!r:.60} as supporting_{kind}s; it must be a list of {kind}s"
            )
        if labels:
            return frozenset((kind, str(label)) for label in labels)
    return frozenset()


def _labels_of(hits: Sequence[ScoredDocument]) -> set[tuple[str, str]]:
    documents = [hit.document for hit in hits]
    return {("id", document.id) for document in documents} | {("title", document.title) for document in documents}
