"""One step of building or using an index, in a process of its own, so that ``bench.py`` can see its memory.

python -m tools.bench.retrieval.worker STEP SOURCE FOLDER THREADS

It prints the seconds of the step, without those of imports.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from calibadv.retrieval import BM25
from calibadv.retrieval.corpus.arrow import ArrowCorpus
from calibadv.retrieval.corpus.convert import convert, file_source
from calibadv.retrieval.index.bm25 import build_bm25, save_bm25
from calibadv.retrieval.index.faiss import build_faiss, load_faiss, nearest_rows, save_faiss
from calibadv.retrieval.index.manifest import write_manifest

TOP_K = 3


def do_nothing(source: Path, folder: Path) -> None:
    """Import what all steps import, which is what the others' memory starts from."""


def convert_file(source: Path, folder: Path) -> None:
    """Convert a JSON-lines file into the corpus of an index."""
    convert(file_source(source), folder / "corpus")


def index_words(source: Path, folder: Path) -> None:
    """Make an index of a converted corpus."""
    corpus = ArrowCorpus(source)
    save_bm25(build_bm25(corpus, "english", None, show_progress=False), folder / "bm25")
    write_manifest(folder, "bm25", corpus, {"stopwords": "english", "stemmer": None})


def index_vectors(source: Path, folder: Path) -> None:
    """Make a Flat index of one vector for each document of the corpus that lies in the folder."""
    corpus = ArrowCorpus(folder / "corpus")
    shards = [np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(source.iterdir())]
    dimension = shards[0].shape[1]
    save_faiss(build_faiss(shards, len(corpus), dimension, "Flat"), folder / "faiss.index")
    prompts = {"query_prompt": "", "passage_prompt": ""}
    write_manifest(folder, "faiss", corpus, {"encoder": "minilm", **prompts, "factory": "Flat", "dimension": dimension})


def search_words(source: Path, folder: Path) -> None:
    """Open an index, and search it for the queries of a file."""
    BM25(index=str(folder)).search(json.loads(source.read_text()), TOP_K)


def search_vectors(source: Path, folder: Path) -> None:
    """Open an index, and search it for the vectors of a file."""
    vectors = np.load(source, allow_pickle=False)
    nearest_rows(load_faiss(folder / "faiss.index", len(ArrowCorpus(folder / "corpus"))), vectors, TOP_K)


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "nothing": do_nothing,
    "convert": convert_file,
    "bm25": index_words,
    "flat": index_vectors,
    "search bm25": search_words,
    "search flat": search_vectors,
}


def main() -> None:
    """Do the step."""
    import bm25s  # type: ignore[import-untyped]  # noqa: F401
    import faiss
    import pyarrow as pa  # type: ignore[import-untyped]  # noqa: F401

    step, source, folder, threads = sys.argv[1:]
    faiss.omp_set_num_threads(int(threads))
    start = time.perf_counter()
    STEPS[step](Path(source), Path(folder))
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
