"""Reranking with a cross-encoder, which reads query and document together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from calibadv.errors import RetrievalError, UserError
from calibadv.interfaces import Retriever
from calibadv.retrieval.checks import check_at_least, check_fetch_k, check_search
from calibadv.retrieval.corpus.base import searchable_text
from calibadv.retrieval.encoders.loading import ModelKind, load_model
from calibadv.retrieval.outcomes import search_outcomes, unwrap
from calibadv.types import Metrics, ScoredDocument

_CROSS_ENCODER = ModelKind(
    option="model",
    remedy="the folder of a sentence-transformers cross-encoder, or its name on the Hugging Face hub",
    owner="cross-encoder",
)

_Pair = tuple[str, str]  # the query and the text of a document


class Reranked(Retriever):
    """Rerank the documents of another retriever with a cross-encoder: the paper fetches 20 and keeps 3.

    The score of a document is the model's logit, since a sigmoid would round high ones to a tie; it may be negative,
    and its last bits may depend on the other documents of its batch. Weights are read from safetensors only.

    Args:
        retriever: First-stage retriever, by class_path; its own top_k is ignored.
        model: sentence-transformers cross-encoder: a folder, or a name on the Hugging Face hub such as
            cross-encoder/ms-marco-MiniLM-L6-v2.
        top_k: Documents that an episode asks for per search.
        fetch_k: Documents to rerank; a search for more documents fetches as many.
        batch_size: Documents that the model scores at a time.
        device: Device of the model, such as cpu or cuda:1; the first accelerator by default, else the CPU.
        max_length: Tokens of query and document together; the rest is cut off. By default the model's limit.

    Raises:
        UserError: the model does not load or is no cross-encoder with one score, ``fetch_k`` is below ``top_k``,
            ``max_length`` exceeds the model's limit, or a number is below 1.
    """

    def __init__(
        self,
        retriever: Retriever,
        model: str,
        top_k: int = 3,
        fetch_k: int = 20,
        batch_size: int = 32,
        device: str | None = None,
        max_length: int | None = None,
    ) -> None:
        check_fetch_k(top_k, fetch_k)
        check_at_least(1, batch_size=batch_size, max_length=max_length)
        self.top_k = top_k
        self.corpus = retriever.corpus
        self._retriever = retriever
        self._fetch_k = fetch_k
        self._batch_size = batch_size
        self._model = _load_cross_encoder(model, device)
        most = self._model.max_seq_length
        if max_length is not None:
            if max_length > most:
                raise UserError(f"max_length is {max_length}; model '{model}' reads at most {most} tokens")
            self._model.max_seq_length = max_length

    @override
    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        check_search(queries, top_k)
        outcomes = search_outcomes(self._retriever, queries, max(self._fetch_k, top_k))
        pairs: set[_Pair] = set()
        for query, outcome in zip(queries, outcomes, strict=True):
            if not isinstance(outcome, RetrievalError):
                pairs.update(_pairs(query, outcome))
        scores = self._score(pairs)
        return unwrap(
            [
                outcome if isinstance(outcome, RetrievalError) else _rescored(query, outcome, scores)[:top_k]
                for query, outcome in zip(queries, outcomes, strict=True)
            ]
        )

    def _score(self, pairs: set[_Pair]) -> dict[_Pair, float]:
        """Score each different pair once: equal ones would differ by rounding with their position in the batch."""
        from torch.nn import Identity

        if not pairs:
            return {}
        ordered = sorted(pairs)
        scores = self._model.predict(
            ordered, batch_size=self._batch_size, show_progress_bar=False, activation_fn=Identity()
        )
        return dict(zip(ordered, scores.tolist(), strict=True))

    @override
    def metrics(self) -> Metrics:
        return self._retriever.metrics()


def _pairs(query: str, hits: list[ScoredDocument]) -> list[_Pair]:
    return [(query, searchable_text(hit.document)) for hit in hits]


def _rescored(query: str, hits: list[ScoredDocument], scores: dict[_Pair, float]) -> list[ScoredDocument]:
    scored = (ScoredDocument(hit.document, scores[pair]) for hit, pair in zip(hits, _pairs(query, hits), strict=True))
    return sorted(scored, key=lambda hit: -hit.score)


def _load_cross_encoder(name: str, device: str | None) -> Any:
    from sentence_transformers import CrossEncoder

    model = load_model(_CROSS_ENCODER, name, device, CrossEncoder)
    # sentence-transformers also loads models without a classifier, and initializes one at random.
    first = model[0]
    architectures = getattr(first.model.config, "architectures", None) or []
    classifies = getattr(first, "transformer_task", "") == "sequence-classification"
    if classifies and architectures and not any(a.endswith("ForSequenceClassification") for a in architectures):
        raise UserError(
            f"model '{name}' is a {architectures[0]}, whose classifier would be random; give a cross-encoder, such as "
            "cross-encoder/ms-marco-MiniLM-L6-v2"
        )
    if model.num_labels != 1:
        raise UserError(
            f"model '{name}' gives {model.num_labels} scores to a pair; give a cross-encoder that gives one"
        )
    return model
