"""The commands ``search``, ``serve`` and ``audit``, on an index or on a configured retriever."""

from __future__ import annotations

from argparse import ArgumentError
from json import dumps
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from rich.text import Text

from calibadv.analysis.audit import CoverageAudit, audit_coverage
from calibadv.config.errors import explain
from calibadv.config.files import config_name, read_yaml, resolve_config
from calibadv.data.questions import read_questions
from calibadv.errors import UserError
from calibadv.interfaces import Retriever
from calibadv.retrieval import BM25, Dense  # imports every retriever, and only those have short names
from calibadv.retrieval.checks import check_at_least
from calibadv.retrieval.http.server import ServerLimits, run_server
from calibadv.retrieval.index.manifest import read_manifest
from calibadv.retrieval.outcomes import search_outcomes, unwrap
from calibadv.types import ScoredDocument

_RECALL_AT = [2, 5]
_LIMITS = ServerLimits()
# Columns of the terminal; the text takes the rest.
_ID_WIDTH, _TITLE_WIDTH = 20, 30


def search(
    query: str, index: Path | None = None, retriever: str | None = None, top_k: int = 5, json: bool = False
) -> None:
    """Search for one query, and print what is found.

    Args:
        query: What to search for.
        index: Folder that 'calibadv index' wrote.
        retriever: In the place of an index: a YAML file as for fit, or a packaged config such as retrievers/hybrid (but
            retrievers/bm25 and retrievers/dense leave the corpus to the config that they complete).
        top_k: The most documents to print.
        json: Print a JSON list of objects with rank, score, id, title and text, uncut.

    Raises:
        UserError: the query is empty, ``top_k`` is below 1, or there is no such index or retriever.
    """
    if not query.strip():
        raise UserError("query is empty; give --query at least one word")
    check_at_least(1, top_k=top_k)
    [hits] = unwrap(search_outcomes(open_retriever(index, retriever), [query], top_k))
    if json:
        Console().out(dumps([_record(rank, hit) for rank, hit in enumerate(hits, 1)]), highlight=False)
    elif hits:
        Console().print(_search_table(hits))
    else:
        Console().print("nothing matches", highlight=False)


def serve(
    index: Path | None = None,
    retriever: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: ServerLimits = _LIMITS,
) -> None:
    """Answer searches over HTTP, in Search-R1's protocol (POST /retrieve), until Ctrl-C or SIGTERM.

    Args:
        index: Folder that 'calibadv index' wrote.
        retriever: In the place of an index: a YAML file as for fit, or a packaged config such as retrievers/hybrid (but
            retrievers/bm25 and retrievers/dense leave the corpus to the config that they complete).
        host: Name or address to listen on. The default reaches this machine only; 0.0.0.0 reaches the whole network,
            and nobody is asked for a password.
        port: Port to listen on; 0 takes a free one.
        limits: What a request may ask for.

    Raises:
        UserError: there is no such index or retriever, a limit is below 1, or the address cannot be listened on.
    """
    run_server(open_retriever(index, retriever), host, port, limits)


def audit(
    questions: Path,
    index: Path | None = None,
    retriever: str | None = None,
    top_k: list[int] = _RECALL_AT,
    json: bool = False,
) -> None:
    """Measure what questions can get: do their answers occur in the corpus, and are their documents found?

    Args:
        questions: Question file; what should be found is its metadata.supporting_ids or metadata.supporting_titles.
        index: Folder that 'calibadv index' wrote.
        retriever: In the place of an index: a YAML file as for fit, or a packaged config such as retrievers/hybrid (but
            retrievers/bm25 and retrievers/dense leave the corpus to the config that they complete).
        top_k: One or more k: recall@k is the mean share of a question's supporting documents among the first k.
        json: Print a JSON object with questions, answer_coverage and recall.

    Raises:
        UserError: a question file or retriever cannot be used, or a number of ``top_k`` is below 1.
    """
    for k in top_k:
        check_at_least(1, top_k=k)
    asked = read_questions(str(questions))
    searched = open_retriever(index, retriever)
    found = audit_coverage(asked, searched.corpus, searched, top_k)
    if json:
        recall = {str(k): value for k, value in found.recall.items()}
        summary = {"questions": found.questions, "answer_coverage": found.answer_coverage, "recall": recall}
        Console().out(dumps(summary), highlight=False)
    else:
        Console().print(_audit_table(found))


def open_retriever(index: Path | None, retriever: str | None) -> Retriever:
    """Open what is to be searched.

    Args:
        index: folder that 'calibadv index' wrote, or None.
        retriever: packaged config or YAML file that holds ``model.retriever``, or a ``class_path`` and its
            ``init_args`` alone; or None.

    Returns:
        BM25 or Dense for an index, else the configured retriever.

    Raises:
        UserError: both are given or none is, or what is given cannot be opened.
    """
    if index is None and retriever is None:
        raise UserError("there is nothing to search; give --index DIR or --retriever NAME_OR_FILE")
    if index is not None and retriever is not None:
        raise UserError(f"--index {index} and --retriever {retriever} exclude each other; give one of them")
    if index is not None:
        of_words = read_manifest(index).backend == "bm25"
        return BM25(index=str(index)) if of_words else Dense(index=str(index))
    return _configured_retriever(resolve_config(str(retriever)))


def _configured_retriever(path: Path) -> Retriever:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--retriever", type=Retriever, required=True)
    try:
        parsed = parser.parse_object({"retriever": _retriever_of(path)})
    except ArgumentError as error:
        raise UserError(f"config '{config_name(path)}': {explain(str(error))}") from error
    given = parsed.retriever.get("init_args", {})
    if given.get("corpus", "") is None and given.get("index", "") is None:
        raise UserError(
            f"config '{config_name(path)}' does not say what to search, being an overlay; copy it, and add corpus or "
            "index to its init_args"
        )
    opened: Retriever = parser.instantiate(parsed).retriever
    return opened


def _retriever_of(path: Path) -> Any:
    content = read_yaml(path)
    model = content.get("model")
    if isinstance(model, dict) and "retriever" in model:
        return model["retriever"]
    if "class_path" in content:
        return content
    raise UserError(
        f"config '{config_name(path)}' describes no retriever; write 'model: {{retriever: {{class_path: ..., "
        "init_args: ...}}' into it, or class_path and init_args alone"
    )


def _record(rank: int, hit: ScoredDocument) -> dict[str, Any]:
    document = hit.document
    return {"rank": rank, "score": hit.score, "id": document.id, "title": document.title, "text": document.text}


def _search_table(hits: list[ScoredDocument]) -> Table:
    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    table.add_column("id", no_wrap=True, max_width=_ID_WIDTH)
    table.add_column("title", no_wrap=True, max_width=_TITLE_WIDTH)
    table.add_column("text", no_wrap=True, ratio=1)
    for rank, hit in enumerate(hits, 1):
        document = hit.document
        shown = [_shown(value) for value in (document.id, document.title, document.text)]
        table.add_row(str(rank), f"{hit.score:.4g}", *shown)
    return table


def _shown(value: str) -> Text:
    """Return a document's text without control characters, which would act on the terminal."""
    printable = "".join(char if char.isprintable() else " " for char in value)
    return Text(" ".join(printable.split()))


def _audit_table(found: CoverageAudit) -> Table:
    coverage = found.answer_coverage
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("questions", str(found.questions))
    table.add_row("with supporting documents", str(found.labelled))
    table.add_row("answer in the corpus", _share(coverage, "the corpus is out of reach"))
    for k, value in found.recall.items():
        table.add_row(f"recall@{k}", _share(value, "no question names its supporting documents"))
    return table


def _share(value: float | None, why_not: str) -> str:
    return f"unknown: {why_not}" if value is None else f"{value:.3f}"
