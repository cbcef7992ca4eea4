"""The retrieval server: the shapes that other projects' clients rely on, limits, batching and an orderly end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.serving import ask, serving

from calibadv.cli.main import main
from calibadv.errors import OutageError, PartialRetrievalError, RetrievalError
from calibadv.retrieval.corpus.files import parse_document
from calibadv.retrieval.http.batcher import Batcher, BusyError
from calibadv.retrieval.http.schema import join_contents
from calibadv.retrieval.http.server import ServerLimits, listen, make_app, run_server
from calibadv.retrieval.memory import MemoryRetriever
from calibadv.types import Document, ScoredDocument

PRAGUE = Document("7", "Prague", "Prague is a city.\nIt lies on the Vltava.")
UNTITLED = Document("8", "", "A text without a title.")
RESULTS = {"city?": ["7", "8"], "text?": ["8"]}


class Counting(MemoryRetriever):
    """Records each search. The first waits until ``open`` is set, so that further requests pile up behind it."""

    def __init__(
        self,
        documents: Sequence[Document] = (PRAGUE, UNTITLED),
        results: dict[str, list[str]] = RESULTS,
        failing: list[str] | None = None,
    ) -> None:
        super().__init__(list(documents), results, failing=failing)
        self.searches: list[tuple[list[str], int]] = []
        self.entered = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        self.searches.append((list(queries), top_k))
        self.entered.set()
        assert self.open.wait(10)
        if "poison" in queries:
            raise TypeError("a bug in a retriever")
        return super().search(queries, top_k)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(MemoryRetriever([PRAGUE, UNTITLED], RESULTS, top_k=1, failing=["broken"])) as address:
        yield address


def test_search_r1_client(url: str) -> None:
    # One request for all rollouts that search in this turn, without looking at the status; then the first line of
    # contents is the title, with its quotes, and the others are the text.
    status, answer, headers = ask(
        url, {"queries": ["city?", "unheard", "text?"], "topk": 3, "return_scores": True}, Accept="*/*"
    )
    assert (status, headers["content-type"]) == (200, "application/json")
    first, nothing, second = answer["result"]
    lines = [hit["document"]["contents"].split("\n") for hit in first]
    assert lines == [['"Prague"', "Prague is a city.", "It lies on the Vltava."], ["A text without a title."]]
    assert nothing == []
    assert [hit["score"] for hit in first + second] == [1.0, 0.5, 1.0]


def test_search_r1_client_asks_even_when_no_rollout_searches(url: str) -> None:
    assert ask(url, {"queries": [], "topk": 3, "return_scores": True})[:2] == (200, {"result": []})


def test_verl_client(url: str) -> None:
    # It retries 500, 502, 503 and 504, gives up on any other error, and takes an empty 'result' for no results: a
    # query that finds nothing must still have its own, empty list.
    headers = {"Accept": "application/json"}
    status, answer, _ = ask(url, {"queries": ["unheard"], "topk": 3, "return_scores": True}, **headers)
    assert (status, answer) == (200, {"result": [[]]})
    status, answer, _ = ask(url, {"queries": ["city?"], "topk": 1, "return_scores": True}, **headers)
    [[hit]] = answer["result"]
    assert hit == {"document": {"id": "7", "contents": f'"Prague"\n{PRAGUE.text}'}, "score": 1.0}
    assert ask(url, {"queries": ["broken"], "topk": 1, "return_scores": True}, **headers)[0] in (500, 502, 503, 504)


def test_skyrl_client(url: str) -> None:
    # One query per request, many requests over one connection that stays open; it strips contents and looks no further.
    connection = HTTPConnection(url.removeprefix("http://"), timeout=10)
    for query, expected in (("text?", "A text without a title."), ("city?", f'"Prague"\n{PRAGUE.text}')):
        body = json.dumps({"queries": [query], "topk": 3, "return_scores": True})
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "keep-alive"}
        connection.request("POST", "/retrieve", body, headers)
        response = connection.getresponse()
        assert json.loads(response.read())["result"][0][0]["document"]["contents"].strip() == expected
        assert not response.will_close
    connection.close()


@pytest.mark.parametrize("scores", [{}, {"return_scores": False}, {"return_scores": None}])
def test_without_scores_documents_stand_alone(url: str, scores: dict[str, Any]) -> None:
    _, answer, _ = ask(url, {"queries": ["city?"], "topk": 2, **scores})
    assert answer == {
        "result": [
            [
                {"id": "7", "contents": f'"Prague"\n{PRAGUE.text}'},
                {"id": "8", "contents": "A text without a title."},
            ]
        ]
    }


@pytest.mark.parametrize(
    "body",
    [
        {"query": "city?"},
        {"query": ["city?"]},
        {"queries": "city?", "topk": None},
        {"queries": None, "query": "city?", "topk": None, "mode": "lexical"},
    ],
)
def test_other_spellings_of_a_request(url: str, body: dict[str, Any]) -> None:
    # No topk: the retriever's own top_k, 1 here.
    _, answer, _ = ask(url, body)
    assert [[document["id"] for document in documents] for documents in answer["result"]] == [["7"]]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is not JSON"),
        (b'{"queries": ["a"', 400, "the body is not JSON"),
        (b'{"queries": ["\xff"]}', 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        ([1], 422, 'the body is not an object but list; send {"queries":'),
        ({"topk": 3}, 422, "the body has no 'queries'"),
        ({"queries": {"a": 1}}, 422, "queries is {'a': 1}; it must be a list of strings"),
        ({"queries": ["a", 7]}, 422, "queries[1] is 7; it must be a string"),
        ({"queries": ["a"] * 4097}, 422, "queries holds 4097 queries; send at most 4096"),
        ({"queries": ["a"], "topk": 0}, 422, "topk is 0; it must be a whole number from 1 to 100"),
        ({"queries": ["a"], "topk": 101}, 422, "topk is 101; it must be a whole number from 1 to 100"),
        ({"queries": ["a"], "topk": "3"}, 422, "topk is '3'"),
        ({"queries": ["a"], "topk": True}, 422, "topk is True"),
        ({"queries": ["a"], "return_scores": "yes"}, 422, "return_scores is 'yes'; it must be true or false"),
        ({"queries": ["city?", "broken"]}, 502, "the search for 'broken' is scripted to fail"),
    ],
)
def test_refusals_give_a_reason(url: str, body: Any, status: int, message: str) -> None:
    answered, answer, _ = ask(url, body)
    assert (answered, list(answer)) == (status, ["error"])
    assert answer["error"].startswith(message)
    assert "\n" not in answer["error"]
    assert ask(url, {"query": "city?"})[0] == 200


def test_a_query_of_100_000_characters(url: str) -> None:
    assert ask(url, {"queries": ["é" * 100_000]})[:2] == (200, {"result": [[]]})


def test_the_body_limit_holds_for_declared_and_streamed_bodies() -> None:
    limit = 1000
    with serving(Counting(), ServerLimits(max_body_bytes=limit)) as url:
        frame = len(json.dumps({"queries": [""]}))
        assert ask(url, {"queries": ["a" * (limit - frame)]})[0] == 200
        expected = {"error": "the body has more than 1000 bytes; send fewer queries at once"}
        assert ask(url, {"queries": ["a" * (limit - frame + 1)]})[:2] == (413, expected)
        assert ask(url, {"queries": ["a" * 5_000_000]})[:2] == (413, expected)
        assert ask(url, iter([b"a" * 600] * 3))[:2] == (413, expected)
        # A body that has not ended yet is refused as soon as it is too long.
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as endless:
            endless.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            endless.sendall(b"3e9\r\n" + b"a" * 1001 + b"\r\n")
            assert endless.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_leaves_in_the_middle_of_its_body(url: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as leaving:
            leaving.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert ask(url, {"query": "city?"})[0] == 200
    assert not caplog.records


def test_health(url: str) -> None:
    status, answer, _ = ask(url, b"", "/health", "GET")
    assert status == 200
    assert answer.items() >= {"status": "ok", "retriever": "MemoryRetriever", "top_k": 1}.items()
    known = MemoryRetriever()
    known.corpus = [PRAGUE, UNTITLED]
    with serving(known) as other:
        assert ask(other, b"", "/health", "GET")[1]["documents"] == 2
        known.corpus = None
        assert ask(other, b"", "/health", "GET")[1]["documents"] is None


@pytest.mark.parametrize(("path", "method", "status"), [("/search", "POST", 404), ("/retrieve", "GET", 405)])
def test_other_routes_are_refused_in_json(url: str, path: str, method: str, status: int) -> None:
    answered, answer, _ = ask(url, b"", path, method)
    assert answered == status
    assert answer["error"].startswith(f"{method} {path}: ")


def test_a_bug_in_the_retriever_is_logged_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Counting()) as url, caplog.at_level(logging.ERROR):
        status, answer, _ = ask(url, {"queries": ["poison"]})
        assert (status, answer["error"].split(";")[0]) == (500, "the search failed with TypeError")
        assert ask(url, {"queries": ["city?"]})[0] == 200
    [record] = caplog.records
    assert record.exc_text is not None
    assert "a bug in a retriever" in record.exc_text


def test_clients_at_once_share_searches_and_get_their_own_answers() -> None:
    ids = [str(number) for number in range(32)]
    documents = [Document(number, "", f"text {number}") for number in ids]
    retriever = Counting(documents, {f"q{number}": [number, *ids[:3]] for number in ids})
    retriever.open.clear()
    with serving(retriever) as url, ThreadPoolExecutor(32) as clients:

        def client(number: str) -> list[str]:
            top_k = 1 + int(number) % 2
            _, answer, _ = ask(url, {"queries": [f"q{number}"], "topk": top_k})
            return [document["id"] for document in answer["result"][0]]

        answers = clients.map(client, ids)
        assert retriever.entered.wait(10)
        threading.Timer(0.3, retriever.open.set).start()
        assert list(answers) == [[number, "0"][: 1 + int(number) % 2] for number in ids]
    assert len(retriever.searches) < 32
    assert sorted(query for queries, _ in retriever.searches for query in queries) == sorted(f"q{n}" for n in ids)


def test_too_many_waiting_queries_are_told_to_come_again() -> None:
    retriever = Counting()
    retriever.open.clear()
    with serving(retriever, ServerLimits(max_pending=2)) as url, ThreadPoolExecutor(1) as clients:
        # A single request may be larger than the limit, or it would never be answered.
        first = clients.submit(ask, url, {"queries": ["city?", "text?", "unheard"]})
        assert retriever.entered.wait(10)
        status, answer, headers = ask(url, {"queries": ["city?"]})
        assert (status, headers["retry-after"]) == (503, "1")
        assert answer["error"].startswith("3 queries wait already, of 2 at most")
        retriever.open.set()
        assert first.result()[0] == 200
        assert ask(url, {"queries": ["city?"]})[0] == 200


def batched(retriever: Counting, *requests: tuple[list[str], int], max_batch: int = 100) -> list[Any]:
    """Ids per query of each request, or its exception, when all arrive in the same moment."""

    async def run() -> list[Any]:
        async with Batcher(retriever, max_batch, max_pending=100) as batcher:
            answers = (batcher.search(queries, top_k) for queries, top_k in requests)
            return await asyncio.gather(*answers, return_exceptions=True)

    return [
        answer if isinstance(answer, Exception) else [[hit.document.id for hit in hits] for hits in answer]
        for answer in asyncio.run(run())
    ]


def test_requests_of_one_moment_are_one_search_per_top_k() -> None:
    retriever = Counting()
    answers = batched(retriever, (["city?", "text?"], 2), (["text?"], 1), (["unheard"], 2), (["city?"], 1))
    assert answers == [[["7", "8"], ["8"]], [["8"]], [[]], [["7"]]]
    assert retriever.searches == [(["city?", "text?", "unheard"], 2), (["text?", "city?"], 1)]


def test_a_search_has_no_more_queries_than_it_may() -> None:
    retriever = Counting()
    requests = [["city?"] * 2, ["text?"], ["city?"] * 2, ["text?"] * 5, ["city?"]]
    answers = batched(retriever, *((queries, 1) for queries in requests), max_batch=3)
    # 2 + 1 fit into 3; 2 stand alone before the 5, which are more than a search may have but are one request.
    assert [len(queries) for queries, _ in retriever.searches] == [3, 2, 5, 1]
    assert answers == [[["7"]] * 2, [["8"]], [["7"]] * 2, [["8"]] * 5, [["7"]]]


def test_a_request_that_breaks_the_search_fails_alone() -> None:
    good, poisoned, other = batched(Counting(), (["city?"], 1), (["text?", "poison"], 1), (["text?"], 1))
    assert (good, other) == ([["7"]], [["8"]])
    assert isinstance(poisoned.__cause__, TypeError)


def test_only_requests_with_a_failing_query_fail_and_nothing_is_searched_for_again() -> None:
    retriever = Counting(failing=["broken"])
    answers = batched(retriever, (["city?"], 1), (["text?", "broken"], 1), (["broken"], 1), (["text?"], 1))
    assert (answers[0], answers[3]) == ([["7"]], [["8"]])
    assert [type(answer) for answer in answers[1:3]] == [PartialRetrievalError, RetrievalError]
    assert len(retriever.searches) == 1


def test_a_failure_of_the_whole_backend_is_not_tried_again_for_each_request() -> None:
    class Down(Counting):
        def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
            super().search(queries, top_k)
            raise RetrievalError("down")

    retriever = Down()
    answers = batched(retriever, (["city?"], 1), (["text?"], 1))
    assert [str(answer) for answer in answers] == ["down", "down"]
    assert len(retriever.searches) == 1


def test_a_failure_that_is_due_to_a_query_is_told_from_an_outage(url: str) -> None:
    class Away(MemoryRetriever):
        def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
            raise OutageError("away")

    status, _, headers = ask(url, {"queries": ["city?", "broken"]})
    assert (status, headers["x-search-failed"]) == (502, "true")
    with serving(Away()) as away:
        status, answer, headers = ask(away, {"queries": ["city?"]})
    assert (status, answer) == (502, {"error": "away"})
    assert "x-search-failed" not in headers


def test_waiting_queries_are_counted_until_they_are_answered() -> None:
    async def run() -> None:
        async with Batcher(Counting(), max_batch=10, max_pending=2) as batcher:
            waiting = [asyncio.create_task(batcher.search(["city?"], 1)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(BusyError, match="2 queries wait already, of 2 at most; try again later"):
                await batcher.search(["text?"], 1)
            waiting[0].cancel()
            assert len(await waiting[1]) == 1
            assert len(await batcher.search(["text?", "city?"], 1)) == 2

    asyncio.run(run())


def test_a_retriever_that_loses_queries_is_found_out() -> None:
    class Losing(Counting):
        def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
            return super().search(queries[1:], top_k)

    [answer] = batched(Losing(), (["city?", "text?"], 1))
    said = "Losing.search returned 1 results for 2 queries; it must be one list of documents per query"
    assert str(answer) == said


TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\n\r\u2028'), max_size=12)


@given(title=TEXT.filter(lambda title: "\n" not in title), text=TEXT)
def test_titles_and_texts_survive_being_joined(title: str, text: str) -> None:
    document = parse_document({"id": "1", "contents": join_contents(title, text)}, "here")
    assert (document.title, document.text) == (title, text)


def test_joined_contents() -> None:
    assert join_contents("Alû", "A demon,\nin two lines.") == '"Alû"\nA demon,\nin two lines.'
    assert join_contents('"Heroes"', "") == '""Heroes""\n'
    assert join_contents("", "One line.") == "One line."
    assert join_contents("", "Two\nlines.") == '""\nTwo\nlines.'
    assert join_contents("Two\nlines", "text") == '"Two lines"\ntext'


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="max_queries is 0; it must be at least 1"):
        ServerLimits(max_queries=0)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}; .* pip install 'calibadv\[serve\]'"):
        make_app(MemoryRetriever())


def test_addresses_that_cannot_be_listened_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} \(Address already in use\); give another host or port"):
            run_server(MemoryRetriever(), port=port)
    with pytest.raises(ValueError, match="port is 70000; it must be from 0 to 65535"):
        run_server(MemoryRetriever(), port=70000)
    # 203.0.113.0/24 is for documentation: no machine has it.
    with pytest.raises(ValueError, match=r"host '203\.0\.113\.1', port 0 \(Cannot assign requested address\); give"):
        run_server(MemoryRetriever(), host="203.0.113.1", port=0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_answers_are_not_held_back_for_an_acknowledgement(host: str) -> None:
    with listen(host, 0) as listener, socket.create_connection(listener.getsockname()):
        assert listener.getsockname()[0] == "127.0.0.1"
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


SERVER = """
import sys, time
from calibadv.retrieval.memory import MemoryRetriever
from calibadv.retrieval.http.server import run_server

class Slow(MemoryRetriever):
    def search(self, queries, top_k):
        print("searching", flush=True)
        sys.stdin.readline()
        time.sleep(0.3)
        return super().search(queries, top_k)

run_server(Slow(), host=sys.argv[1], port=0)
print("ended", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "host", "said"),
    [
        (signal.SIGTERM, "127.0.0.1", "/retrieve, for this machine only; Ctrl-C stops it"),
        (
            signal.SIGINT,
            "0.0.0.0",
            "/retrieve; WARNING: anyone who can reach this machine may query it; Ctrl-C stops it",
        ),
    ],
)
def test_a_signal_lets_requests_in_flight_be_answered(number: int, host: str, said: str) -> None:
    command = [sys.executable, "-c", SERVER, host]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as server, ThreadPoolExecutor(1) as clients:
        try:
            assert server.stdin is not None
            assert server.stdout is not None
            greeting = server.stdout.readline().rstrip("\n")
            assert greeting.startswith(f"serving at http://{host}:")
            assert greeting.endswith(said)
            port = greeting.partition("/retrieve")[0].rpartition(":")[2]
            answer = clients.submit(ask, f"http://127.0.0.1:{port}", {"queries": ["a"]})
            assert server.stdout.readline() == "searching\n"
            server.send_signal(number)
            server.stdin.write("\n")
            server.stdin.flush()
            assert answer.result()[:2] == (200, {"result": [[]]})
            rest, errors = server.communicate(timeout=20)
            assert (rest, errors, server.returncode) == ("ended\n", "", 0)
        finally:
            server.kill()


# A search that takes longer than anybody waits, and 1 s in the place of the 60 that it is given after a signal.
STUCK = SERVER.replace("sys.stdin.readline()", "time.sleep(600)")
HASTY = f"from calibadv.retrieval.http import server; server._GRACE = 1\n{STUCK}"


@pytest.mark.parametrize(
    ("script", "signals", "errors"),
    [
        (STUCK, [signal.SIGINT, signal.SIGINT], ""),
        (HASTY, [signal.SIGTERM], "Cancel 1 running task(s), timeout graceful shutdown exceeded\n"),
    ],
    ids=["two Ctrl-C", "the time is over"],
)
def test_a_search_that_does_not_end_does_not_hold_the_server(script: str, signals: list[int], errors: str) -> None:
    command = [sys.executable, "-c", script, "127.0.0.1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as server, ThreadPoolExecutor(1) as clients:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().partition("/retrieve")[0].rpartition(":")[2])
            answer = clients.submit(ask, f"http://127.0.0.1:{port}", {"queries": ["a"]})
            assert server.stdout.readline() == "searching\n"
            for number in signals:
                server.send_signal(number)
                wait_until_closed(port)
            said = "the server stops; ask another one, or this one when it is up again"
            assert answer.result()[:2] == (503, {"error": said})
            assert (*server.communicate(timeout=20), server.returncode) == ("ended\n", errors, 0)
        finally:
            server.kill()


def wait_until_closed(port: int) -> None:
    """A server that has heeded a signal does not listen any more."""
    for _ in range(1000):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)
    pytest.fail("the server still listens")


def test_limits_are_given_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--limits", "limits.yaml"]) == 2
    assert "option --limits is not accepted; did you mean --limits.max_" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    said = capsys.readouterr().out
    assert "--limits.max_queries" in said
    assert "--limits " not in said
