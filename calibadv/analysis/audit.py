"""Coverage audit: upper bounds that a corpus and a retriever set for questions, before any training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from calibadv.errors import UserError
from calibadv.interfaces import Retriever
from calibadv.io.progress_bar import blocks, progress_bar
from calibadv.retrieval.corpus.base import searchable_text
from calibadv.retrieval.outcomes import search_outcomes, unwrap
from calibadv.rewards.answer import normalise_answer
from calibadv.types import Document, Question, ScoredDocument

# Larger corpora take more than about two seconds to read, so a progress bar is shown.
_MANY_DOCUMENTS = 20_000
# Questions per search; with a slow retriever there is still progress to see.
_BATCH = 64

Label = tuple[str, str]  # of a document: ``id`` or ``title``, and its value


@dataclass(frozen=True, slots=True)
class CoverageAudit:
    """Coverage of a set of questions; shares are None where they cannot be known."""

    questions: int
    answer_coverage: float | None  # share of the questions one of whose gold answers occurs in the corpus
    labelled: int  # questions that name their supporting documents; recall is the mean over these
    recall: dict[int, float | None]  # by k: mean share of the supporting documents among the first k


def audit_coverage(
    questions: Sequence[Question], corpus: Sequence[Document] | None, retriever: Retriever, top_k: Sequence[int]
) -> CoverageAudit:
    """Measure answer coverage of a corpus and recall of a retriever.

    Each question is searched for once, as it is asked. The corpus is read once, whatever its size.
    """
    if not top_k or min(top_k) < 1:
        raise UserError(f"top_k is {list(top_k)}; give one or more numbers, each at least 1")
    labelled = [(question, labels) for question in questions if (labels := supporting_labels(question))]
    recalls = list(_recalls(labelled, retriever, top_k))
    return CoverageAudit(
        questions=len(questions),
        answer_coverage=None if corpus is None else answer_coverage(questions, corpus),
        labelled=len(labelled),
        recall={k: fmean(values[k] for values in recalls) if recalls else None for k in top_k},
    )


def _recalls(
    labelled: Sequence[tuple[Question, frozenset[Label]]], retriever: Retriever, top_k: Sequence[int]
) -> Iterator[dict[int, float]]:
    """Recall of each question, by k."""
    for batch in blocks(labelled, _BATCH, "Searching", hidden=len(labelled) <= _BATCH):
        found = unwrap(search_outcomes(retriever, [question.question for question, _ in batch], max(top_k)))
        for (_, labels), hits in zip(batch, found, strict=True):
            yield {k: len(labels & _labels_of(hits[:k])) / len(labels) for k in top_k}


def answer_coverage(questions: Sequence[Question], corpus: Sequence[Document]) -> float:
    """Return the share of questions one of whose gold answers occurs in a title or text of a corpus.

    Answers and documents are normalised as for scoring, and an answer must occur as whole words. An answer that
    normalises to nothing occurs nowhere. Coverage is an upper bound: ``yes``, ``no`` and small numbers occur in almost
    any corpus. The corpus is read once, and only until all answers are found.
    """
    wanted = [
        {answer for golden in question.golden_answers if (answer := normalise_answer(golden))} for question in questions
    ]
    # Keyed by the longest word, likely the rarest: only texts that contain it are searched for the answer.
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
            found |= _pop_found(missing, normalise_answer(searchable_text(document)))
            advance(1)
    return sum(not answers.isdisjoint(found) for answers in wanted) / len(questions)


def _pop_found(missing: dict[str, set[str]], text: str) -> set[str]:
    """Remove the answers that occur in a normalised text from ``missing``, and return them."""
    padded = f" {text} "
    found = set()
    for word in missing.keys() & text.split():
        here = {answer for answer in missing[word] if f" {answer} " in padded}
        found |= here
        missing[word] -= here
        if not missing[word]:
            del missing[word]
    return found


def supporting_labels(question: Question) -> frozenset[Label]:
    """Return the ids, or without ids the titles, of the documents that support a question."""
    for kind in ("id", "title"):
        labels: Any = question.metadata.get(f"supporting_{kind}s")
        if labels and not isinstance(labels, list):
            raise UserError(
                f"question '{question.id}' has {labels!r:.60} as supporting_{kind}s; it must be a list of {kind}s"
            )
    kind, found = question.supporting()
    return frozenset((kind, label) for label in found)


def _labels_of(hits: Sequence[ScoredDocument]) -> set[Label]:
    documents = [hit.document for hit in hits]
    return {("id", document.id) for document in documents} | {("title", document.title) for document in documents}
