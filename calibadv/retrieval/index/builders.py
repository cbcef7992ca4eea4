"""The index types of ``calibadv index``: estimate of the cost, and building."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from calibadv.io.files import save_array
from calibadv.io.progress_bar import progress_bar
from calibadv.retrieval.corpus.base import Corpus, searchable_text
from calibadv.retrieval.corpus.size import Sample
from calibadv.retrieval.index.cost import IndexCost, index_size, peak_memory
from calibadv.retrieval.index.manifest import Backend
from calibadv.types import Document

# Documents per file of embeddings: a killed build encodes at most so many again.
_SHARD_ROWS = 1 << 13
# Documents encoded between two steps of the progress bar.
_STEP_ROWS = 1 << 10
_TIMED_DOCUMENTS = 32
# Peak memory of building with bm25s, measured on 10^4 and 10^5 passages of 100 words.
_BM25_BYTES_PER_WORD, _BM25_BYTES = 20, 64_000_000
# Heaps' law: n times the text has about n ** 0.6 times the different words.
_HEAPS_EXPONENT, _VOCABULARY_BYTES_PER_WORD = 0.6, 20
_LARGE_CORPUS = 20_000


class IndexBuilder(ABC):
    """Builder of one type of index."""

    name: Backend  # name of the type in the manifest
    settings: dict[str, Any]  # settings for the manifest

    def check(self, documents: int) -> None:  # noqa: B027  # most types need no check
        """Refuse a corpus with too few documents for this type of index."""

    @abstractmethod
    def cost(self, sample: Sample) -> IndexCost:
        """Estimate the cost of the index by a trial on a few documents."""

    @abstractmethod
    def build(self, corpus: Corpus, target: Path, work: Path) -> None:
        """Write the index to ``target``; ``work`` is a folder for parts from which a later run may resume."""


class BM25Builder(IndexBuilder):
    """Builder of an index for ``BM25``."""

    name: Backend = "bm25"

    def __init__(self, stopwords: str | list[str] = "english", stemmer: str | None = None) -> None:
        self.settings = {"stopwords": stopwords, "stemmer": stemmer}

    @override
    def cost(self, sample: Sample) -> IndexCost:
        from calibadv.retrieval.index.bm25 import build_bm25

        build_bm25(sample.documents[:8], **self.settings, show_progress=False)  # not timed: imports
        start = time.perf_counter()
        build_bm25(sample.documents, **self.settings, show_progress=False)
        seconds = time.perf_counter() - start
        words = [re.findall(r"\w\w+", searchable_text(d).lower()) for d in sample.documents]
        postings = sample.extrapolate(sum(len(set(found)) for found in words))
        vocabulary = len(set(chain.from_iterable(words))) * (sample.total / len(words)) ** _HEAPS_EXPONENT
        disk = 8 * postings + round(_VOCABULARY_BYTES_PER_WORD * vocabulary)  # a posting is a float32 and an int32
        memory = _BM25_BYTES + sample.extrapolate(_BM25_BYTES_PER_WORD * sum(map(len, words)))
        return IndexCost(disk, 0, peak_memory() + memory, sample.extrapolate(seconds))

    @override
    def build(self, corpus: Corpus, target: Path, work: Path) -> None:
        from calibadv.retrieval.index.bm25 import build_bm25, save_bm25

        save_bm25(build_bm25(corpus, **self.settings, show_progress=len(corpus) >= _LARGE_CORPUS), target)


class FaissBuilder(IndexBuilder):
    """Builder of an index for ``Dense``."""

    name: Backend = "faiss"

    def __init__(
        self,
        encoder: str = "minilm",
        factory: str = "Flat",
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        from calibadv.retrieval.encoders.encoder import Encoder
        from calibadv.retrieval.index.faiss import make_index

        self._encoder = Encoder(encoder, query_prompt, passage_prompt, batch_size, device)
        self.settings = {
            "encoder": encoder,
            "query_prompt": self._encoder.query_prompt,
            "passage_prompt": self._encoder.passage_prompt,
            "factory": factory,
            "dimension": self._encoder.dimension,
        }
        self._index = make_index(factory, self._encoder.dimension)
        self._size = index_size(self._index)

    @override
    def check(self, documents: int) -> None:
        from calibadv.retrieval.index.faiss import check_trainable

        check_trainable(self._index, self.settings["factory"], documents)

    @override
    def cost(self, sample: Sample) -> IndexCost:
        documents = sample.documents[:: max(1, len(sample.documents) // _TIMED_DOCUMENTS)][:_TIMED_DOCUMENTS]
        self._encoder.encode_passages(documents[:4])  # not timed: the first call includes one-time preparation
        start = time.perf_counter()
        self._encoder.encode_passages(documents)
        seconds = (time.perf_counter() - start) * sample.total / len(documents)
        embeddings = 4 * self.settings["dimension"] * sample.total
        index = self._size.fixed + round(self._size.per_vector * sample.total)
        factory = self.settings["factory"]
        unknown = [] if self._size.trained else ["time of training"]
        unknown += [] if factory == "Flat" else [f"time of filling {factory}"]
        unknown += [] if self._size.known else ["its size beyond the vectors"]
        training = 0 if self._size.trained else min(embeddings, self._size.training)
        return IndexCost(index, embeddings, peak_memory() + index + training, seconds, ", ".join(unknown))

    @override
    def build(self, corpus: Corpus, target: Path, work: Path) -> None:
        from calibadv.retrieval.index.faiss import fill_index, save_faiss

        shards = encode_shards(corpus, self._encoder.encode_passages, work)
        fill_index(self._index, self.settings["factory"], shards, len(corpus))
        save_faiss(self._index, target)


def encode_shards(
    corpus: Sequence[Document],
    encode: Callable[[Sequence[Document]], NDArray[np.float32]],
    folder: Path,
    shard_rows: int = _SHARD_ROWS,
) -> list[NDArray[np.float32]]:
    """Encode a corpus into ``embeddings-00000.npy`` and so on; existing files are kept."""
    paths = [folder / f"embeddings-{shard:05d}.npy" for shard in range(-(-len(corpus) // shard_rows))]
    with progress_bar("Encoding the corpus", len(corpus), hidden=len(corpus) <= _STEP_ROWS) as advance:
        for shard, path in enumerate(paths):
            rows = range(shard * shard_rows, min((shard + 1) * shard_rows, len(corpus)))
            if path.exists():
                advance(len(rows))
                continue
            parts = []
            for first in rows[::_STEP_ROWS]:
                parts.append(encode(corpus[first : min(first + _STEP_ROWS, rows.stop)]))
                advance(len(parts[-1]))
            save_array(path, np.concatenate(parts))
    return [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
