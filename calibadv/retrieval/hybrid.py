"""Reciprocal rank fusion of several retrievers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import fsum

from typing_extensions import override

from calibadv.errors import RetrievalError, UserError
from calibadv.interfaces import Retriever
from calibadv.retrieval.checks import check_at_least, check_fetch_k, check_search
from calibadv.retrieval.corpus.base import Corpus
from calibadv.retrieval.outcomes import SearchOutcome, search_outcomes, unwrap
from calibadv.types import Document, Metrics, ScoredDocument


class Hybrid(Retriever):
    """Fuse the lists of several retrievers by rank: the score of a document is the sum of 1 / (rrf_k + its rank).

    Reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009) uses ranks only, so that scores of different
    kinds need no common scale. Documents are matched by id: all retrievers must search the same corpus.

    Args:
        retrievers: Retrievers to fuse, by class_path. Tied documents are ordered as their retrievers are.
        top_k: Documents that an episode asks for per search.
        fetch_k: Documents fetched from each retriever; a search for more documents fetches as many.
        rrf_k: Constant added to each rank; a larger one gives the first ranks less weight.

    Raises:
        UserError: no retriever, ``top_k`` below 1, ``fetch_k`` below ``top_k``, ``rrf_k`` below 0, or different
            corpora.
    """

    def __init__(self, retrievers: list[Retriever], top_k: int = 3, fetch_k: int = 20, rrf_k: int = 60) -> None:
        check_fetch_k(top_k, fetch_k)
        if not retrievers:
            raise UserError("retrievers is empty; name at least one retriever to fuse")
        check_at_least(0, rrf_k=rrf_k)
        corpora = [retriever.corpus for retriever in retrievers if retriever.corpus is not None]
        _check_corpora(corpora)
        self.top_k = top_k
        self.corpus = corpora[0] if corpora else None
        self._retrievers = retrievers
        self._fetch_k = fetch_k
        self._rrf_k = rrf_k

    @override
    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        check_search(queries, top_k)
        fetch_k = max(self._fetch_k, top_k)
        outcomes = [search_outcomes(retriever, queries, fetch_k) for retriever in self._retrievers]
        return unwrap([self._fuse(column, top_k) for column in zip(*outcomes, strict=True)])

    def _fuse(self, outcomes: Sequence[SearchOutcome], top_k: int) -> SearchOutcome:
        """Fuse the results for one query, or return the first error among them."""
        lists: list[list[ScoredDocument]] = []
        for outcome in outcomes:
            if isinstance(outcome, RetrievalError):
                return outcome
            lists.append(outcome)
        return reciprocal_rank_fusion(lists, self._rrf_k)[:top_k]

    @override
    def metrics(self) -> Metrics:
        reported: dict[str, list[float]] = defaultdict(list)
        for retriever in self._retrievers:
            for name, value in retriever.metrics().items():
                reported[name].append(value)
        return {name: sum(values) / len(values) for name, values in reported.items()}


def _check_corpora(corpora: Sequence[Sequence[Document]]) -> None:
    sizes = sorted({len(corpus) for corpus in corpora})
    if len(sizes) > 1:
        raise UserError(
            f"the retrievers search corpora of {sizes[0]} and {sizes[-1]} documents; documents are fused by id: "
            "give all of them the same corpus"
        )
    # One corpus opened twice is two objects; the checksum of a large one is stored with it.
    known = {id(corpus): corpus for corpus in corpora if isinstance(corpus, Corpus)}.values()
    if len(known) > 1 and len({corpus.checksum for corpus in known}) > 1:
        raise UserError(
            f"the retrievers search different corpora of {sizes[0]} documents each; documents are fused by id: give "
            "all of them the same corpus"
        )


def reciprocal_rank_fusion(lists: Sequence[Sequence[ScoredDocument]], rrf_k: int) -> list[ScoredDocument]:
    """Fuse the ranked lists of one query; the score of a document is the sum of 1 / (rrf_k + rank)."""
    documents: dict[str, Document] = {}
    shares: dict[str, list[float]] = defaultdict(list)
    for hits in lists:
        for rank, hit in enumerate(hits, 1):
            documents.setdefault(hit.document.id, hit.document)
            shares[hit.document.id].append(1 / (rrf_k + rank))
    # fsum rounds once, so that the same ranks in another order give the same score.
    fused = [ScoredDocument(document, fsum(shares[doc_id])) for doc_id, document in documents.items()]
    return sorted(fused, key=lambda hit: -hit.score)
