"""Opening of a corpus: a file, the folder of an index, or ``embedded``."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from calibadv.retrieval.corpus.base import IN_MEMORY_BYTES, Corpus, MemoryCorpus
from calibadv.retrieval.corpus.convert import BATCH_ROWS, NumberedDocuments, Source, file_source
from calibadv.retrieval.corpus.files import read_documents
from calibadv.retrieval.corpus.size import Sample, read_sample, sample_file, sample_step
from calibadv.retrieval.corpus.text_folder import PassageSize, read_text_folder
from calibadv.retrieval.index.manifest import MANIFEST, UNFINISHED, open_index


def open_corpus(
    path: str | Path, in_memory_bytes: int = IN_MEMORY_BYTES, passages: PassageSize | None = None
) -> Corpus:
    """Open a corpus: a JSON-lines file, plain or gzip, a folder of text files or of an index, or ``embedded``.

    A large file is converted once to memory-mapped Arrow files, in the folder that the environment variable
    CALIBADV_CACHE names, or else in ~/.cache/calibadv.
    """
    if str(path) == "embedded":
        from calibadv.world import embedded_world

        return Corpus.from_documents(embedded_world().documents)
    path = Path(path)
    if path.is_dir() and not (path / MANIFEST).exists() and not (path / UNFINISHED).exists():
        return Corpus.from_documents(read_text_folder(path, passages or PassageSize()))
    if path.is_dir():
        return open_index(path)[1]
    if path.is_file() and path.stat().st_size > in_memory_bytes:
        from calibadv.retrieval.corpus.cache import cached_corpus

        return cached_corpus(path)
    with closing(read_documents(path)) as numbered:
        return MemoryCorpus(numbered, str(path))


def open_source(path: str, passages: PassageSize | None = None) -> Source:
    """Return the source of a corpus that ``open_corpus`` opens; a JSON-lines file is not read yet."""
    if Path(path).is_file():
        return file_source(Path(path))
    corpus = open_corpus(path, passages=passages)  # raises for a path that does not exist

    def read(after: int) -> NumberedDocuments:
        for start in range(after, len(corpus), BATCH_ROWS):
            yield from enumerate(corpus[start : start + BATCH_ROWS], start + 1)

    return Source(path, {"checksum": corpus.checksum}, read)


def sample_corpus(path: str, passages: PassageSize | None = None) -> Sample:
    """Sample a corpus that ``open_corpus`` opens."""
    if Path(path).is_file():
        return sample_file(Path(path))
    corpus = open_corpus(path, passages=passages)
    rows = range(0, len(corpus), sample_step(len(corpus)))
    documents, seconds = read_sample(corpus[row] for row in rows)
    return Sample(documents, len(corpus), exact=True, seconds=seconds * len(corpus) / len(documents))
