"""The kinds of index that ``calibadv index`` builds: what each costs, and how it is built."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from calibadv.io.files import save_array
from calibadv.io.progress_bar import progress_bar
from calibadv.retrieval.corpus.base import Corpus, searched_text
from calibadv.retrieval.corpus.size import Sample
from calibadv.retrieval.index.cost import index_size, peak_memory
from calibadv.retrieval.index.manifest import Backend
from calibadv.types import Document

# Documents whose embeddings are one file, the most that a kill costs; and how many are encoded between two steps of the
# progress bar.
SHARD_ROWS = 1 << 13
_STEP_ROWS = 1 << 10
_TIMED_DOCUMENTS = 32
# Peak memory of building with bm25s, measured on 10^4 and 10^5 passages of 100 words.
_BM25_BYTES_PER_WORD, _BM25_BYTES = 20, 64_000_000
# Heaps' law: n times the text has about n ** 0.6 times the different words; each has so many bytes in the vocabulary.
_HEAPS, _VOCABULARY_BYTES = 0.6, 20
_LARGE_CORPUS = 20_000


@dataclass(frozen=True, slots=True)
class Cost:
    """What an index needs, beside the corpus.

    Attributes:
        index_bytes: on disk, at the end.
        temporary_bytes: on disk, until then.
        memory_bytes: of the process, at its peak.
        seconds: to build it.
        unknown: what the figures leave out, for the user.
    """

    index_bytes: int
    temporary_bytes: int
    memory_bytes: int
    seconds: float
    unknown: str = ""


class IndexBackend(ABC):
    """One kind of index.

    Attributes:
        name: as the manifest has it.
        settings: what the manifest keeps.
    """

    name: Backend
    settings: dict[str, Any]

    def check(self, documents: int) -> None:  # noqa: B027  # most kinds are built of any corpus
        """Refuse a corpus that this kind of index cannot be built of."""

    @abstractmethod
    def cost(self, sample: Sample) -> Cost:
        """Estimate, by trying it on a few documents.

        Args:
            sample: of the corpus.

        Returns:
            The cost.
        """

    @abstractmethod
    def build(self, corpus: Corpus, target: Path, work: Path) -> None:
        """Build the index.

        Args:
            corpus: the documents.
            target: file or folder to write.
            work: folder for parts that a later run may go on with.
        """


class BM25Index(IndexBackend):
    """An index for ``BM25``.

    Args:
        stopwords: words that are not searched for.
        stemmer: how words are stemmed, if at all.
    """

    name: Backend = "bm25"

    def __init__(self, stopwords: str | list[str] = "english", stemmer: str | None = None) -> None:
        self.settings = {"stopwords": stopwords, "stemmer": stemmer}

    @override
    def cost(self, sample: Sample) -> Cost:
        from calibadv.retrieval.index.bm25 import build_bm25

        build_bm25(sample.documents[:8], **self.settings, show_progress=False)  # not timed: imports
        start = time.perf_counter()
        build_bm25(sample.documents, **self.settings, show_progress=False)
        seconds = time.perf_counter() - start
        words = [re.findall(r"\w\w+", searched_text(d).lower()) for d in sample.documents]
        postings = sample.scale(sum(len(set(found)) for found in words))
        vocabulary = len(set(chain.from_iterable(words))) * (sample.total / len(words)) ** _HEAPS
        disk = 8 * postings + round(_VOCABULARY_BYTES * vocabulary)  # a posting is a float32 and an int32
        memory = _BM25_BYTES + sample.scale(_BM25_BYTES_PER_WORD * sum(map(len, words)))
        return Cost(disk, 0, peak_memory() + memory, sample.scale(seconds))

    @override
    def build(self, corpus: Corpus, target: Path, work: Path) -> None:
        from calibadv.retrieval.index.bm25 import build_bm25, save_bm25

        save_bm25(build_bm25(corpus, **self.settings, show_progress=len(corpus) >= _LARGE_CORPUS), target)


class FaissIndex(IndexBackend):
    """An index for ``Dense``.

    Args:
        encoder: of ``Encoder``.
        factory: index type, as ``faiss.index_factory`` reads it.
        query_prompt: put before queries; the encoder's own by default.
        passage_prompt: put before passages; the encoder's own by default.
        batch_size: passages that are encoded together.
        device: where the encoder runs.

    Raises:
        UserError: there is no such encoder, or faiss does not make such an index.
    """

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
        from calibadv.retrieval.index.faiss import check_count

        check_count(self._index, self.settings["factory"], documents)

    @override
    def cost(self, sample: Sample) -> Cost:
        documents = sample.documents[:: max(1, len(sample.documents) // _TIMED_DOCUMENTS)][:_TIMED_DOCUMENTS]
        self._encoder.encode_passages(documents[:4])  # not timed: the first call prepares more than it encodes
        start = time.perf_counter()
        self._encoder.encode_passages(documents)
        seconds = (time.perf_counter() - start) * sample.total / len(documents)
        embeddings = 4 * self.settings["dimension"] * sample.total
        index = self._size.fixed + round(self._size.per_vector * sample.total)
        unknown = "" if self._size.trained else "time of training, "
        unknown += "" if self.settings["factory"] == "Flat" else f"time of filling {self.settings['factory']}"
        unknown += "" if self._size.known else ", what it takes beyond its vectors"
        training = 0 if self._size.trained else min(embeddings, self._size.training)
        return Cost(index, embeddings, peak_memory() + index + training, seconds, unknown)

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
    shard_rows: int = SHARD_ROWS,
) -> list[NDArray[np.float32]]:
    """Encode a corpus into ``embeddings-00000.npy`` and so on; those that are there already are kept."""
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
