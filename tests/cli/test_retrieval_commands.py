"""search, serve, audit and index as users type them: what is on which stream, and one line for each mistake."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import unicodedata
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from calibadv.cli.command_table import COMMANDS
from calibadv.cli.commands import command_parser
from calibadv.cli.main import main
from calibadv.cli.retrieval import open_retriever
from calibadv.config.files import config_name, configs_folder
from calibadv.retrieval import BM25, Cached, Dense, Remote

PROGRAM = [sys.executable, "-m", "calibadv.cli.main"]
HOSTILE = {
    "id": "3",
    "title": "\x1b]0;owned\x07",
    "text": "[bold]red[/bold] :fox:\r\nin\x9b31m two\u2028lines \u202egnol\x1b[2J " + "and a long tail " * 20,
}
CORPUS = [
    {"id": "0", "title": "Prague", "text": "Prague is the capital of Bohemia, a city."},
    {"id": "1", "title": "Łódź", "text": "Łódź is a city in Poland."},
    {"id": "2", "title": "Tea", "text": "Tea grows on hills."},
    HOSTILE,
]
QUESTIONS = [
    {
        "id": "a",
        "question": "capital of Bohemia",
        "golden_answers": ["Prague"],
        "metadata": {"supporting_ids": ["0", "2"]},
    },
    {
        "id": "b",
        "question": "city in Poland",
        "golden_answers": ["Lodz"],
        "metadata": {"supporting_titles": ["Łódź"]},
    },
    {"id": "c", "question": "tea?", "golden_answers": ["hills"]},
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a corpus, questions, and retrievers as YAML."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name, records in (("corpus", CORPUS), ("questions", QUESTIONS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    bm25 = "class_path: BM25\ninit_args: {corpus: corpus.jsonl}\n"
    script = '{class_path: MemoryRetriever, init_args: {results: {"a. b": []}, failing: [broken]}}'
    texts = {
        "bm25.yaml": bm25,
        "overlay.yaml": "model:\n  retriever:\n    " + bm25.replace("\n", "\n    "),
        "memory.yaml": script,
        "none.yaml": "model: {group_size: 3}",
        "empty.yaml": "",
        "list.yaml": "- class_path: BM25",
        "misspelt.yaml": "class_path: BM52",
        "option.yaml": "class_path: BM25\ninit_args: {corpsu: corpus.jsonl}",
        "missing.yaml": "class_path: BM25\ninit_args: {corpus: no.jsonl}",
        "nested.yaml": "class_path: Cached\ninit_args: {retriever: {class_path: BM25, init_args: {corpus: no.jsonl}}}",
        "remote.yaml": 'class_path: Remote\ninit_args: {url: "http://127.0.0.1:9", retries: 0, backoff: 0}',
        "labels.jsonl": json.dumps({**QUESTIONS[0], "metadata": {"supporting_ids": "0"}}),
        "only.jsonl": json.dumps(QUESTIONS[2]),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], words: str, *more: str) -> str:
    """What a command that succeeds prints as its result."""
    assert main([*words.split(), *more]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def parsed(capsys: pytest.CaptureFixture[str], words: str, *more: str) -> Any:
    return json.loads(printed(capsys, words, *more))


# search


def test_search_prints_a_row_per_document(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "search --retriever bm25.yaml --query", "a city in Poland")
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert lines[0] == ["rank", "score", "id", "title", "text"]
    assert [(line[0], *line[2:4]) for line in lines[1:]] == [("1", "1", "Łódź"), ("2", "0", "Prague")]
    assert printed(capsys, "search --retriever bm25.yaml --query zebra") == "nothing matches\n"


def test_search_prints_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [hit] = parsed(capsys, "search --retriever bm25.yaml --query fox --json --top_k 3")
    score = hit.pop("score")
    assert score > 0
    assert hit == {"rank": 1, **HOSTILE}
    hits = parsed(capsys, "search --retriever bm25.yaml --json --query city")
    assert [(hit["rank"], hit["id"]) for hit in hits] == [(1, "1"), (2, "0")]
    assert list(hits[0]) == ["rank", "score", "id", "title", "text"]
    assert parsed(capsys, "search --retriever bm25.yaml --json --query zebra") == []
    assert len(parsed(capsys, "search --retriever bm25.yaml --json --query city --top_k=1")) == 1


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_a_document_cannot_steer_the_terminal(
    json_flag: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, "search --retriever bm25.yaml --query fox", *json_flag)
    assert [char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") and char != "\n"] == []
    if not json_flag:
        header, row = text.splitlines()
        assert "]0;owned" in row
        assert "[bold]red[/bold] :fox: in 31m two lines gnol [2J" in row
        assert row.endswith("…")
        assert max(len(header.rstrip()), len(row)) <= 100


def test_documents_go_into_any_terminal(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns in ("20", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        text = printed(capsys, "search --retriever bm25.yaml --query", "fox city")
        assert len(text.splitlines()) == 4
        assert max(map(len, text.splitlines())) <= int(columns)


# what is searched


@pytest.mark.parametrize("name", ["bm25.yaml", "overlay.yaml"])
def test_a_retriever_alone_and_an_overlay_are_the_same(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parsed(capsys, f"search --retriever {name} --query tea --json")[0]["id"] == "2"


def test_a_packaged_config_is_named_as_for_fit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hits = parsed(capsys, "search --retriever retrievers/cached --query mayor --json --top_k 2")
    assert hits == parsed(capsys, "search --retriever quickstart --query mayor --json --top_k 2")
    assert len(hits) == 2


def test_packaged_retrievers_are_what_they_say(here: Path) -> None:
    for name, kind in (("cached", Cached), ("remote", Remote)):
        assert type(open_retriever(None, f"retrievers/{name}")) is kind


@pytest.mark.parametrize("path", sorted((configs_folder() / "retrievers").glob("*.yaml")), ids=config_name)
def test_packaged_retrievers_say_how_they_are_used(path: Path) -> None:
    comment = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"--config {config_name(path)}" in comment


def test_an_index_is_opened_as_what_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for backend, kind in (("bm25", BM25), ("faiss", Dense)):
        assert main(["index", "--corpus", "corpus.jsonl", "--out", backend, "--backend", backend]) == 0
        assert capsys.readouterr().out == f"wrote {backend}\n"
        assert type(open_retriever(Path(backend), None)) is kind
        assert parsed(capsys, f"search --index {backend} --query", "hills of tea", "--json")[0]["id"] == "2"
    text = printed(capsys, "audit --index bm25 --questions questions.jsonl --json")
    assert text == printed(capsys, "audit --retriever bm25.yaml --questions questions.jsonl --json")


def test_an_index_is_verified(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "--corpus", "corpus.jsonl", "--out", "built", "--backend", "bm25"]) == 0
    capsys.readouterr()
    size = sum(path.stat().st_size for path in (here / "built").glob("*/*"))
    text = printed(capsys, "index --verify built")
    assert text == f"index 'built' is whole: 8 files, {size / 1000:.1f} kB\n"
    shard = here / "built" / "corpus" / "shard-00000.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"Bohemia", b"Bohemja"))
    for words in ("index --verify built", "search --index built --query city"):
        assert main(words.split()) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert re.match(
            r"calibadv: error: 'built/corpus/shard-00000.arrow' is damaged \(.*\); copy the folder again", last
        )


def test_several_words_are_a_list_and_one_is_a_word(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, words in (("list", "tea city"), ("word", "none")):
        base = f"index --corpus corpus.jsonl --backend bm25 --out {out} --stopwords {words}"
        assert main(base.split()) == 0
        capsys.readouterr()
    assert parsed(capsys, "search --index list --query tea --json") == []
    assert len(parsed(capsys, "search --index list --query is --json")) == 2
    assert len(parsed(capsys, "search --index word --query is --json")) == 2


# audit


def test_audit_by_hand(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Prague and hills occur, Lodz does not (Łódź does). Of {0, 2} the first search finds 0; the second finds Łódź.
    expected = {"questions": 3, "answer_coverage": 2 / 3, "recall": {"1": 0.75, "2": 0.75}}
    base = "audit --retriever bm25.yaml --questions questions.jsonl --json --top_k"
    for words in (["1", "2"], ["[1, 2]"], ["1", "2", "--json"]):
        text = printed(capsys, base, *words)
        assert json.loads(text) == expected
        assert text.count("\n") == 1
    assert parsed(capsys, base, "2")["recall"] == {"2": 0.75}
    assert list(parsed(capsys, base.removesuffix(" --top_k"))["recall"]) == ["2", "5"]


def test_audit_prints_a_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "audit --retriever bm25.yaml --questions questions.jsonl --top_k 1")
    assert [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()] == [
        ["questions", "3"],
        ["with supporting documents", "2"],
        ["answer in the corpus", "0.667"],
        ["recall@1", "0.750"],
    ]


def test_audit_says_what_it_cannot_know(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = "audit --retriever remote.yaml --questions only.jsonl --top_k 2"
    text = printed(capsys, base)
    assert "unknown: the corpus is out of reach" in text
    assert "unknown: no question names its supporting documents" in text
    assert parsed(capsys, base, "--json") == {"questions": 1, "answer_coverage": None, "recall": {"2": None}}


@pytest.mark.parametrize(("top_k", "least"), [("2", 0.59), ("5", 0.75)])
def test_audit_of_real_questions(
    top_k: str, least: float, shared: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared / "data" / "hotpotqa_small"
    (here / "real.yaml").write_text(f"class_path: BM25\ninit_args: {{corpus: {folder / 'corpus.jsonl'}}}")
    found = parsed(
        capsys, "audit --retriever real.yaml --json --top_k", top_k, "--questions", str(folder / "questions.jsonl")
    )
    assert found["questions"] == 100
    assert found["recall"][top_k] >= least


# serve


def test_serve_answers_until_it_is_told_to_stop(here: Path) -> None:
    words = ["serve", "--retriever", "bm25.yaml", "--port", "0", "--limits.max_queries", "2"]
    process = subprocess.Popen([*PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+/retrieve", process.stdout.readline())
        assert url is not None
        body = json.dumps({"queries": ["tea"], "topk": 1, "return_scores": True}).encode()
        request = urllib.request.Request(url[0], body, {"Content-Type": "application/json"})
        [[hit]] = json.load(urllib.request.urlopen(request))["result"]
        assert hit["document"] == {"id": "2", "contents": '"Tea"\nTea grows on hills.'}
        many = urllib.request.Request(url[0], json.dumps({"queries": ["tea"] * 3}).encode())
        with pytest.raises(urllib.error.HTTPError, match="422"):
            urllib.request.urlopen(many)
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")


# mistakes and help

MISTAKES: dict[str, tuple[str, str]] = {
    "no index": ("search --query x", r"nothing to search; give --index DIR or --retriever NAME_OR_FILE"),
    "two of them": (
        "search --query x --index i --retriever bm25.yaml",
        r"--index i and --retriever bm25.yaml exclude each other; give one of them",
    ),
    "serve without": ("serve", r"nothing to search; give --index DIR or"),
    "audit without": ("audit --questions questions.jsonl", r"nothing to search; give --index DIR or"),
    "no query": ("search --retriever bm25.yaml", r"--query VALUE is missing$"),
    "top_k of 0": ("search --retriever bm25.yaml --query x --top_k 0", r"top_k is 0; it must be at least 1"),
    "top_k of 0 in a list": (
        "audit --retriever bm25.yaml --questions questions.jsonl --top_k 2 0",
        r"top_k is 0; it must be at least 1",
    ),
    "top_k is no number": (
        "audit --retriever bm25.yaml --questions questions.jsonl --top_k 2 two",
        r"top_k: 'two' is not accepted; it must be a whole number",
    ),
    "top_k without value": (
        "audit --retriever bm25.yaml --questions questions.jsonl --top_k",
        r"--top_k.*(has no value|expected one argument)",
    ),
    "value of a flag": ("search --retriever bm25.yaml --query x --json=true", r"--json.*true"),
    "abbreviation": ("search --retriever bm25.yaml --quer x", r"--quer is not accepted; did you mean --query\?"),
    "index missing": ("search --index no --query x", r"index 'no' is not a folder; give a folder that"),
    "index is none": ("search --index . --query x", r"without manifest.json, and so not an index"),
    "unknown config": ("search --retriever hybird --query x", r"config 'hybird' is neither .*retrievers/hybrid"),
    "config without": ("search --retriever none.yaml --query x", r"config 'none.yaml' describes no retriever; write"),
    "empty config": ("search --retriever empty.yaml --query x", r"config 'empty.yaml' describes no retriever; write"),
    "config is a list": ("search --retriever list.yaml --query x", r"config 'list.yaml' holds list; write"),
    "class misspelt": (
        "search --retriever misspelt.yaml --query x",
        r"config 'misspelt.yaml': retriever: no class is called 'BM52'; give a known name \(.*BM25.*Hybrid",
    ),
    "option misspelt": (
        "search --retriever option.yaml --query x",
        r"config 'option.yaml': retriever.*: option 'corpsu' is not accepted by BM25; it takes corpus",
    ),
    "corpus missing": ("search --retriever missing.yaml --query x", r"corpus 'no.jsonl' does not exist; give a"),
    "inner corpus missing": ("search --retriever nested.yaml --query x", r"corpus 'no.jsonl' does not exist; give a"),
    "corpus left out": (
        "search --retriever retrievers/bm25 --query x",
        r"config 'retrievers/bm25' does not say what to search",
    ),
    "search fails": ("search --retriever memory.yaml --query broken", r"the search for 'broken' is scripted to fail"),
    "server down": ("search --retriever remote.yaml --query x", r"127.0.0.1:9"),
    "questions missing": (
        "audit --retriever bm25.yaml --questions no.jsonl",
        r"question file 'no.jsonl' does not exist; give",
    ),
    "labels are no list": (
        "audit --retriever bm25.yaml --questions labels.jsonl",
        r"question 'a' has '0' as supporting_ids; it must be a list of ids",
    ),
    "limit of 0": (
        "serve --retriever bm25.yaml --limits.max_queries 0",
        r"max_queries is 0; it must be at least 1",
    ),
    "address": ("serve --retriever bm25.yaml --port 70000", r"port is 70000; it must be from 0 to 65535"),
    "nothing to build": (
        "index",
        r"--corpus VALUE and --out VALUE and --backend VALUE are missing; give them, or --verify DIR alone to check an",
    ),
    "nowhere to build": (
        "index corpus.jsonl --backend bm25",
        r"--out VALUE is missing; give it, or --verify DIR alone to check an index",
    ),
    "backend misspelt": (
        "index --corpus corpus.jsonl --out out --backend bm52",
        r"backend: 'bm52' is not accepted; it must be 'bm25' or 'faiss'$",
    ),
    "verify no index": ("index --verify no", r"index 'no' is not a folder; give a folder that 'calibadv index' wrote"),
    "verify and build": (
        "index --verify no --stemmer english",
        r"--verify checks an index that is there, and --stemmer is for building one; leave one out",
    ),
    "verify nothing": ("index --verify", r"--verify has no value; give it one"),
    "index below a file": (
        "index --corpus corpus.jsonl --backend bm25 --out corpus.jsonl/o",
        r"out 'corpus.jsonl/o' .*; (give|name) another",
    ),
}


@pytest.mark.parametrize(("words", "line"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(words: str, line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    assert main(words.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    *_, last = output.err.splitlines()
    assert last.startswith("calibadv: error: ")
    assert re.search(line, last), last
    assert output.err.count("\n") == 1 or words.startswith("index")  # which prints its estimate before
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("query", ["", "  "])
def test_an_empty_query_is_a_mistake(query: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--retriever", "bm25.yaml", "--query", query]) == 2
    assert "query is empty; give --query at least one word" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name for name, command in COMMANDS.items() if command.functions])
def test_help_speaks_of_files_and_not_of_types(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    parser = command_parser(command)
    below = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    for one in [parser, *(sub for choices in below for sub in choices.values())]:
        text = one.format_help()
        assert "<class" not in text
        assert "Path" not in text.replace("Path to a configuration file", "")
        assert "null" not in text
        assert "+ " not in text


def test_help_names_what_a_value_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--questions FILE", "[--index DIR]", "[--retriever NAME_OR_FILE]", "[--top_k N ...]", "[--json]"):
        assert option in text
    assert "--top_k N ... One or more k" in text
