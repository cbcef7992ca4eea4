"""Costs of building an index: seconds, disk and memory, each step measured in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tools.bench.retrieval.data import DIMENSION, Vectors, make_queries, write_corpus

# Passages of wiki-18, the corpus of Search-R1.
WIKI = 21_015_324
_POLL = 0.02


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step needed.

    Attributes:
        step: its name in ``worker.py``.
        passages: of the corpus.
        seconds: of the step.
        disk: bytes of what it wrote, or of what it searched.
        resident: bytes of its process at the peak, with the pages of files that it looked at.
        own: bytes at the peak without those, which the system can take back at any time.
    """

    step: str
    passages: int
    seconds: float
    disk: int
    resident: int
    own: int


def run_step(step: str, passages: int, source: Path, folder: Path, threads: int) -> Cost:
    """Run one step of the worker and watch its memory."""
    words = [sys.executable, "-m", "tools.bench.retrieval.worker", step, str(source), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    before = _size(folder)
    process = subprocess.Popen([*words, str(threads)], stdout=subprocess.PIPE, text=True, env=environment)
    resident = own = 0
    while process.poll() is None:
        memory = _memory(process.pid)
        resident = max(resident, memory.get("VmHWM", 0))
        own = max(own, memory.get("RssAnon", 0))
        time.sleep(_POLL)
    assert process.stdout is not None
    printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"step {step} ended with status {process.returncode}")
    written = _size(folder) - before
    return Cost(step, passages, float(printed), written, resident, own)


def _memory(pid: int) -> dict[str, int]:
    """Bytes by the names of Linux; nothing elsewhere, or where the process has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("VmHWM", "RssAnon")))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def build_indexes(root: Path, passages: int, threads: int, keep: bool) -> list[Cost]:
    """Build both indexes of a made-up corpus: ``root/bm25-<passages>`` and ``root/flat-<passages>``.

    Args:
        root: where to; what is not needed any more is removed on the way.
        passages: of the corpus.
        threads: of FAISS.
        keep: leave the indexes there.

    Returns:
        The cost of each step.
    """
    text, vectors = root / "corpus.jsonl", root / "vectors"
    words, flat = root / f"bm25-{passages}", root / f"flat-{passages}"
    words.mkdir()
    flat.mkdir()
    write_corpus(text, passages)
    costs = [run_step("convert", passages, text, words, threads)]
    text.unlink()
    costs.append(run_step("bm25", passages, words / "corpus", words, threads))
    (root / "queries.json").write_text(json.dumps(make_queries(256)))
    costs.append(run_step("search bm25", passages, root / "queries.json", words, threads))
    if keep:
        shutil.copytree(words / "corpus", flat / "corpus")
    else:
        (words / "corpus").rename(flat / "corpus")
    made = Vectors(passages)
    np.save(root / "queries.npy", made.queries(256))
    vectors.mkdir()
    for number, block in enumerate(made.blocks()):
        np.save(vectors / f"{number:05d}.npy", block)
    costs.append(run_step("flat", passages, vectors, flat, threads))
    shutil.rmtree(vectors)
    costs.append(run_step("search flat", passages, root / "queries.npy", flat, threads))
    if not keep:
        shutil.rmtree(words)
        shutil.rmtree(flat)
    return costs


def cost_table(costs: Iterable[Cost], start: Cost, encoded: float) -> Table:
    """Show what each step needed; vectors are made up, as encoding so many passages would take days."""
    names = {
        "convert": "convert the JSON lines",
        "bm25": "BM25 index",
        "search bm25": "open BM25, 256 queries",
        "flat": f"Flat index of {DIMENSION} dimensions",
        "search flat": "open Flat, 256 queries",
    }
    title = f"Building; memory of a process begins at {_mega(start.resident)}, of which {_mega(start.own)} its own"
    table = Table("passages", "step", "seconds", "passages/s", "written", "peak memory", "its own", title=title)
    for cost in costs:
        searching = cost.step.startswith("search")
        table.add_row(
            f"{cost.passages:,}",
            names[cost.step],
            f"{cost.seconds:.1f}",
            "" if searching else f"{cost.passages / cost.seconds:,.0f}",
            "" if searching else _mega(cost.disk),
            _mega(cost.resident),
            _mega(cost.own),
        )
    table.add_row("256", "encode with MiniLM, for a Flat index", f"{256 / encoded:.1f}", f"{encoded:,.1f}", "", "", "")
    return table


def growth_table(costs: list[Cost]) -> Table:
    """What each step needs per passage, from the two largest corpora, and what that makes of wiki-18."""
    title = f"Growth, from the two largest corpora; the last two columns are an estimate for {WIKI:,} passages"
    table = Table("step", "bytes/passage written", "bytes/passage of memory", "written", "its own memory", title=title)
    small, large = sorted({cost.passages for cost in costs})[-2:]
    by_step = {(cost.step, cost.passages): cost for cost in costs}
    for step in dict.fromkeys(cost.step for cost in costs):
        first, last = by_step[step, small], by_step[step, large]
        disk = (last.disk - first.disk) / (large - small)
        memory = (last.own - first.own) / (large - small)
        searching = step.startswith("search")
        table.add_row(
            step,
            "" if searching else f"{disk:,.0f}",
            f"{round(memory):,}",
            "" if searching else _giga(disk * WIKI),
            _giga(last.own + memory * (WIKI - large)),
        )
    return table


def encoding_speed(passages: int, threads: int) -> float:
    """Passages of 100 words that MiniLM encodes in a second."""
    import torch

    from calibadv.retrieval.encoders.encoder import Encoder
    from calibadv.types import Document
    from tools.bench.retrieval.data import Words

    torch.set_num_threads(threads)
    drawn = Words().draw(np.random.default_rng(5), passages, 103)
    documents = [Document(str(row), " ".join(text[:3]), " ".join(text[3:])) for row, text in enumerate(drawn)]
    encoder = Encoder("minilm")
    encoder.encode_passages(documents[:16])  # not timed
    seconds = []
    for start in range(0, passages, 64):
        begin = time.perf_counter()
        encoder.encode_passages(documents[start : start + 64])
        seconds.append(time.perf_counter() - begin)
    return 64 / statistics.median(seconds)


def report_building(console: Console, sizes: list[int], root: Path, threads: int, keep: int) -> list[Table]:
    """Build indexes of all sizes, and keep those of one."""
    start = run_step("nothing", 0, root, root, threads)
    costs = []
    for passages in sizes:
        with console.status(f"building indexes of {passages:,} passages"):
            costs += build_indexes(root, passages, threads, keep=passages == keep)
    with console.status("encoding a sample"):
        speed = encoding_speed(256, threads)
    # In smaller corpora, what does not grow is most of the memory.
    return [cost_table(costs, start, speed), *([growth_table(costs)] if max(sizes) >= 1_000_000 else [])]


def _mega(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def _giga(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
