"""A second look at what a retriever found: a cross-encoder reads query and document together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from calibadv.errors import RetrievalError, UserError
from calibadv.interfaces import Retriever
from calibadv.retrieval.asking import ask, unwrap
from calibadv.retrieval.corpus.base import searched_text
from calibadv.retrieval.encoders.loading import ModelKind, load_model
from calibadv.retrieval.hybrid import check_fetch_k
from calibadv.retrieval.ranking import check_search
from calibadv.types import Metrics, ScoredDocument

_CROSS_ENCODER = ModelKind(
    what="model",
    remedy="the folder of a sentence-transformers cross-encoder, or its name on the Hugging Face hub",
    owner="cross-encoder",
)


class Reranked(Retriever):
    """Order what another retriever found by a cross-encoder, and keep the best: the paper fetches 20 and keeps 3.

    The score of a document is the model's, without the sigmoid at its end, which would round good ones to a tie; it may
    be negative, and may differ in its last bits with the documents that are scored beside it. Weights are read from
    safetensors only.

    Args:
        retriever: What fetches, by class_path; its own top_k is not looked at.
        model: sentence-transformers cross-encoder: a folder, or a name on the Hugging Face hub such as
            cross-encoder/ms-marco-MiniLM-L6-v2.
        top_k: Documents that an episode asks for per search.
        fetch_k: Documents to choose from; a search for more of them fetches as many.
        batch_size: Documents that the model reads at a time.
        device: Where the model runs, such as cpu or cuda:1; the first accelerator by default, else the CPU.
        max_length: Tokens of query and document together, the rest is cut off; as the model has it by default.

    Raises:
        UserError: the model does not load or is no cross-encoder with one score, ``fetch_k`` is below ``top_k``,
            ``max_length`` is more than the model reads, or a number is below 1.
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
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
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
        outcomes = ask(self._retriever, queries, max(self._fetch_k, top_k))
        fetched = [[] if isinstance(outcome, RetrievalError) else outcome for outcome in outcomes]
        pairs = [
            [(query, searched_text(hit.document)) for hit in hits] for query, hits in zip(queries, fetched, strict=True)
        ]
        scores = self._score({pair for row in pairs for pair in row})
        rescored = (
            [ScoredDocument(hit.document, scores[pair]) for hit, pair in zip(hits, row, strict=True)]
            for hits, row in zip(fetched, pairs, strict=True)
        )
        ranked = (sorted(hits, key=lambda hit: -hit.score)[:top_k] for hits in rescored)
        return unwrap(
            [
                outcome if isinstance(outcome, RetrievalError) else hits
                for outcome, hits in zip(outcomes, ranked, strict=True)
            ]
        )

    def _score(self, pairs: set[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """Score each pair once: two that are equal would differ by rounding, with their place in the batch."""
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


def _load_cross_encoder(name: str, device: str | None) -> Any:
    from sentence_transformers import CrossEncoder

    model = load_model(_CROSS_ENCODER, name, device, CrossEncoder)
    # sentence-transformers also loads what could only rank at random.
    first = model[0]
    architectures = getattr(first.model.config, "architectures", None) or []
    classifies = getattr(first, "transformer_task", "") == "sequence-classification"
    if classifies and architectures and not any(a.endswith("ForSequenceClassification") for a in architectures):
        raise UserError(
            f"model '{name}' is a {architectures[0]}, whose classifier would be made up; give a cross-encoder, such as "
            "cross-encoder/ms-marco-MiniLM-L6-v2"
        )
    if model.num_labels != 1:
        raise UserError(
            f"model '{name}' gives {model.num_labels} scores to a pair; give a cross-encoder that gives one"
        )
    return model
