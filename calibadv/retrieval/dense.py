"""Dense retrieval: vectors of an encoder in a FAISS index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from calibadv.errors import UserError
from calibadv.interfaces import Retriever
from calibadv.io.progress_bar import blocks
from calibadv.retrieval.checks import check_at_least, check_search
from calibadv.retrieval.corpus.base import Corpus
from calibadv.retrieval.encoders.encoder import Encoder
from calibadv.retrieval.index.faiss import check_trainable, fill_index, load_faiss, make_index, nearest_rows, set_effort
from calibadv.retrieval.index.manifest import INDEX_NAMES, open_index
from calibadv.retrieval.index.open import open_corpus
from calibadv.types import ScoredDocument

# Passages encoded between two steps of the progress bar, and the size of a corpus from which it is shown.
_STEP, _LARGE_CORPUS = 128, 32


class Dense(Retriever):
    """Dense retrieval: the passages whose vectors have the largest inner product with the query's.

    Every passage has some similarity to every query, so a search finds ``top_k`` passages unless the corpus is smaller
    or an approximate index visits fewer. With Flat the search is exact, with ties in the order of the corpus. The last
    bits of a query's vector may depend on the other queries of its batch.

    Give ``corpus`` alone to encode it at every start; ``index``, a folder of ``calibadv index --backend faiss``, which
    contains corpus, encoder and prompts; or a bare FAISS file as ``index`` with its ``corpus`` and ``encoder``,
    such as Search-R1's e5_Flat.index, wiki-18.jsonl and intfloat/e5-base-v2. Indexes are memory-mapped. A bare file
    does not record its length, and one of type IVF opens even if its last bytes are lost: compare its size.

    Args:
        corpus: JSON-lines file, plain or gzip, or ``embedded``. Leave it out with a folder as ``index``.
        top_k: Documents that an episode asks for per search.
        encoder: Folder of sentence-transformers or transformers, name on the Hugging Face hub, or ``minilm`` (extra
            ``minilm``), which is the default for a corpus. To replace that of an index, give one of the same dimension.
        factory: Index type for a corpus, as ``faiss.index_factory`` reads it, such as Flat (the default),
            ``IVF1024,Flat`` or HNSW32.
        index: Folder of ``calibadv index --backend faiss``, or a bare FAISS file over inner products.
        nprobe: Lists that an IVF index searches; by default the setting of the index, 1 in FAISS.
        ef_search: Candidates that an HNSW index keeps; by default the setting of the index, 16 in FAISS.
        query_prompt: Text put before queries; by default that of the index, or the encoder's own.
        passage_prompt: Text put before passages; by default the encoder's own. The passages of an index are encoded.
        batch_size: Texts that are encoded together.
        device: Device of the encoder, such as ``cpu`` or ``cuda:1``; by default an accelerator if there is one.

    Raises:
        UserError: corpus and index are missing, given twice, unreadable, or do not match (number of documents,
            dimension, passage prompt); faiss does not make ``factory`` or the corpus is too small for it; the index
            has no ``nprobe`` or ``ef_search``; or ``top_k``, ``nprobe``, ``ef_search`` or ``batch_size`` is below 1.
    """

    corpus: Corpus

    def __init__(  # noqa: PLR0913  # the schema of a config
        self,
        corpus: str | None = None,
        top_k: int = 3,
        encoder: str | None = None,
        factory: str | None = None,
        index: str | None = None,
        nprobe: int | None = None,
        ef_search: int | None = None,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        check_at_least(1, top_k=top_k)
        self.top_k = top_k
        if index is not None and factory is not None:
            raise UserError(f"factory is '{factory}', but index '{index}' is built already; leave factory out")
        parts = _resolve_parts(index, corpus, encoder, query_prompt, passage_prompt)
        self.corpus = parts.corpus
        stored = None if parts.file is None else load_faiss(parts.file, len(self.corpus))
        self._encoder = Encoder(parts.encoder, parts.query_prompt, parts.passage_prompt, batch_size, device)
        if stored is None:
            stored = _index_corpus(self.corpus, self._encoder, factory or "Flat")
        elif stored.d != self._encoder.dimension:
            raise UserError(
                f"encoder '{parts.encoder}' makes vectors of {self._encoder.dimension} dimensions, and index '{index}' "
                f"holds vectors of {stored.d}; name the encoder that it was built with"
            )
        set_effort(stored, nprobe, ef_search)
        self._index = stored

    @override
    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        check_search(queries, top_k)
        found: list[list[ScoredDocument]] = [[] for _ in queries]
        nonempty = [i for i, query in enumerate(queries) if query.strip()]
        if nonempty:
            vectors = self._encoder.encode_queries([queries[i] for i in nonempty])
            for i, rows in zip(nonempty, nearest_rows(self._index, vectors, top_k), strict=True):
                found[i] = [ScoredDocument(self.corpus[row], score) for row, score in rows]
        return found


@dataclass(frozen=True, slots=True)
class _Parts:
    """Corpus, encoder, prompts and index file of a search; ``file`` is None if the corpus must be encoded."""

    corpus: Corpus
    encoder: str
    query_prompt: str | None
    passage_prompt: str | None
    file: Path | None = None


def _resolve_parts(
    index: str | None, corpus: str | None, encoder: str | None, query_prompt: str | None, passage_prompt: str | None
) -> _Parts:
    """Fill in the defaults and the settings of the index; refuse contradictions."""
    if index is None:
        if corpus is None:
            raise UserError("Dense has nothing to search; give corpus (a JSON-lines file) or index (a folder or file)")
        return _Parts(open_corpus(corpus), encoder or "minilm", query_prompt, passage_prompt)
    path = Path(index)
    if path.is_dir():
        if corpus is not None:
            raise UserError(f"index '{index}' brings its own corpus; leave out corpus '{corpus}' (set it to null)")
        return _open_folder(path, encoder, query_prompt, passage_prompt)
    if not path.is_file():
        raise UserError(f"index '{index}' does not exist; give a folder of 'calibadv index', or a FAISS file")
    if corpus is None or encoder is None:
        missing = "corpus" if corpus is None else "encoder"
        raise UserError(
            f"index '{index}' is a bare FAISS file, which does not tell its {missing}; give {missing} (for Search-R1's "
            "e5_Flat.index: wiki-18.jsonl and intfloat/e5-base-v2)"
        )
    return _Parts(open_corpus(corpus), encoder, query_prompt, passage_prompt, path)


def _open_folder(folder: Path, encoder: str | None, query_prompt: str | None, passage_prompt: str | None) -> _Parts:
    manifest, corpus = open_index(folder)
    if manifest.backend != "faiss":
        raise UserError(f"index '{folder}' was built with --backend {manifest.backend}; give it to BM25, or build one")
    built = manifest.settings
    if passage_prompt not in (None, built["passage_prompt"]):
        raise UserError(
            f"passage_prompt is {passage_prompt!r}, and the passages of index '{folder}' were encoded with "
            f"{built['passage_prompt']!r}; leave it out, or build the index again"
        )
    return _Parts(
        corpus=corpus,
        encoder=encoder or built["encoder"],
        query_prompt=built["query_prompt"] if query_prompt is None else query_prompt,
        passage_prompt=built["passage_prompt"],
        file=folder / INDEX_NAMES["faiss"],
    )


def _index_corpus(corpus: Corpus, encoder: Encoder, factory: str) -> Any:
    index = make_index(factory, encoder.dimension)
    check_trainable(index, factory, len(corpus))
    parts = blocks(corpus, _STEP, "Encoding the corpus", hidden=len(corpus) < _LARGE_CORPUS)
    fill_index(index, factory, [encoder.encode_passages(part) for part in parts], len(corpus))
    return index
