"""The retrieval client: what it sends, what it reads, and that no failure looks like an empty result."""

from __future__ import annotations

import gzip
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.serving import Reply, Script, Scripted, closed_port, good, serving

from calibadv.errors import OutageError, PartialRetrievalError, RetrievalError
from calibadv.interfaces import Retriever
from calibadv.retrieval.bm25 import BM25
from calibadv.retrieval.memory import MemoryRetriever
from calibadv.retrieval.remote import Remote
from calibadv.types import Document

RECORDS = [
    {"id": 0, "contents": '"Alû"\nA demon,\nin two lines.\u2028Still the second.'},
    {"id": "x", "title": "Lilu", "text": "A demon of the night 夢."},
    {"id": "q", "contents": '""Heroes" (album)"\nNo demon, but David Bowie.'},
    {"id": "u", "title": "", "text": "A demon\nwithout a title\n"},
    {"id": "n", "contents": "No title at all, one demon."},
    {"id": "b", "title": '"', "text": "\n\ndemon 🚂 \\ \u0000 \t"},
    {"id": "e", "title": "Demon, empty", "text": ""},
]


def ids(found: list[list[Any]]) -> list[list[str]]:
    return [[hit.document.id for hit in hits] for hits in found]


def test_over_the_network_bm25_is_bm25(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    local = BM25(str(path))
    queries = ["demon", "david bowie", "", "unheard", "titles title demon night", "  ", "夢 demon"]
    with serving(local) as url:
        for top_k in (1, 3, 100):
            expected = local.search(queries, top_k)
            assert len(expected[0]) == min(top_k, len(RECORDS))
            assert Remote(url).search(queries, top_k) == expected
            assert Remote([url, url], batch_size=2).search(queries, top_k) == expected


def test_what_is_sent() -> None:
    with Scripted(lambda number, body: good(body)) as server:
        found = Remote(server.url, batch_size=2).search(["a", "", "b", "c", " ", "d", "e"], 4)
    assert ids(found) == [["a"], [], ["b"], ["c"], [], ["d"], ["e"]]
    assert server.requests == [
        {"queries": queries, "topk": 4, "return_scores": True} for queries in (["a", "b"], ["c", "d"], ["e"])
    ]


def test_empty_queries_ask_nobody() -> None:
    remote = Remote(f"http://127.0.0.1:{closed_port()}", retries=0)
    assert remote.search([], 3) == []
    assert remote.search(["", " \n"], 3) == [[], []]


@pytest.mark.parametrize(
    ("end", "path"),
    [("", "/retrieve"), ("/", "/retrieve"), ("/retrieve", "/retrieve"), ("/a/search?key=1", "/a/search?key=1")],
)
def test_the_path_is_added_where_there_is_none(end: str, path: str) -> None:
    with Scripted(lambda number, body: good(body)) as server:
        Remote(server.url + end).search(["a"], 1)
    assert server.paths == [path]


def read(hits: Any, top_k: int = 3) -> list[Any]:
    """What Remote makes of these hits to one query."""
    with Scripted(lambda number, body: Reply(200, json.dumps({"result": [hits]}).encode())) as server:
        return Remote(server.url, retries=0).search(["a"], top_k)[0]


def test_documents_without_scores() -> None:
    found = read([{"id": 5, "contents": '"T"\ntext'}, {"id": "6", "title": "U", "text": "v"}])
    assert [hit.document for hit in found] == [Document("5", "T", "text"), Document("6", "U", "v")]
    assert [hit.score for hit in found] == [1.0, 0.5]


def test_documents_of_a_web_search_have_neither_id_nor_score() -> None:
    bare = [{"document": {"contents": f'"{title}"\nsnippet'}} for title in ("A", "B", "A")]
    found = read(bare)
    assert [hit.document.title for hit in found] == ["A", "B", "A"]
    assert [hit.score for hit in found] == [1.0, 0.5, 1 / 3]
    # The same texts are the same document, in every search.
    first, second, third = (hit.document.id for hit in found)
    assert first == third != second
    assert [hit.document.id for hit in read(bare)] == [first, second, third]


def test_a_server_that_sends_too_many_documents() -> None:
    hits = [{"document": {"id": str(rank), "contents": "text"}, "score": -rank} for rank in range(5)]
    assert [(hit.document.id, hit.score) for hit in read(hits, top_k=2)] == [("0", 0.0), ("1", -1.0)]


DOCUMENT = {"id": "1", "contents": "text"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>\n<body>hello", "answered text that is not JSON"),
        (b"\xff\xfe\x00", "answered text that is not JSON"),
        (b"[" * 100_000, "answered text that is not JSON"),
        (b"", "answered text that is not JSON"),
        (b"[]", "answered [], which is not an object with a list of lists as 'result'"),
        (b'{"results": [[]]}', "answered {'results': [[]]}, which is not an object with a list"),
        (b'{"result": {"0": []}}', "which is not an object with a list of lists as 'result'"),
        (b'{"result": [[], null]}', "which is not an object with a list of lists as 'result'"),
        (b'{"result": []}', "answered 0 results to 2 queries"),
        (b'{"result": [[]]}', "answered 1 results to 2 queries"),
        (b'{"result": [[], [], []]}', "answered 3 results to 2 queries"),
        (b'{"result": [[], ["text"]]}', "answered result[1][0], which is not a document but 'text'"),
        (b'{"result": [[{"document": null, "score": 1}], []]}', "result[0][0], which is not a document but None"),
        (b'{"result": [[{"document": {"id": "1"}, "score": 1}], []]}', "result[0][0] has only the keys id"),
        (b'{"result": [[{"id": "1", "contents": 7}], []]}', "result[0][0] has 7 as 'contents'; it must be a string"),
        (b'{"result": [[{"id": [1], "contents": "a"}], []]}', "result[0][0] has the id [1]"),
        *(
            (json.dumps({"result": [[], [{"document": DOCUMENT, "score": score}]]}).encode(), message)
            for score, message in (
                ("high", "result[1][0], which has the score 'high'; it must be a number"),
                (True, "result[1][0], which has the score True"),
                (float("nan"), "result[1][0], which has the score nan"),
                (10**400, "result[1][0], which has the score 1000"),
                (-(10**400), "result[1][0], which has the score -1000"),
                ([1], "result[1][0], which has the score [1]"),
            )
        ),
    ],
)
def test_garbage_is_an_error_at_once(body: bytes, message: str) -> None:
    with Scripted(lambda number, _: Reply(200, body)) as server:
        with pytest.raises(RetrievalError) as caught:
            Remote(server.url, retries=3).search(["a", "b"], 3)
        assert len(server.requests) == 1
    assert str(caught.value).startswith(f"the retrieval server {server.url}/retrieve answered ")
    assert message in str(caught.value)
    assert str(caught.value).endswith("; is this url that of a retrieval server?")
    assert "\n" not in str(caught.value)


def test_a_server_that_is_down() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(RetrievalError) as caught:
        Remote(url, retries=2, backoff=0).search(["a"], 3)
    said = f"the retrieval server {url}/retrieve is down (Connection refused) (3 tries); start it, or correct url"
    assert str(caught.value) == said


def test_a_server_that_is_slow() -> None:
    never = threading.Event()
    with Scripted(lambda number, body: Reply(200, b"", after=never)) as server:
        with pytest.raises(RetrievalError) as caught:
            Remote(server.url, timeout=0.1, retries=1, backoff=0).search(["a"], 3)
        never.set()
        assert len(server.requests) == 2
    assert str(caught.value) == (
        f"the retrieval server {server.url}/retrieve gave no answer within 0.1 s (2 tries); "
        "raise timeout, lower batch_size or add servers"
    )


def test_batches_behind_an_outage_are_not_sent() -> None:
    """Each would hang until its timeout, while a run waits."""
    never = threading.Event()
    with Scripted(lambda number, body: Reply(200, b"", after=never)) as server:
        with pytest.raises(RetrievalError, match="gave no answer within"):
            Remote(server.url, timeout=0.1, retries=0, batch_size=1).search(["a", "b", "c"], 3)
        never.set()
        assert [body["queries"] for body in server.requests] == [["a"]]


def test_a_new_client_knows_that_the_server_has_answered_in_this_process() -> None:
    """A run that goes back to a checkpoint makes its client anew."""
    with Scripted(lambda number, body: good(body)) as server:
        assert Remote(server.url).search(["a"], 3)
    with pytest.raises(OutageError) as caught:
        Remote(server.url, retries=0, patience=7.0).search(["a"], 3)
    assert caught.value.patience == 7.0


class Dripping(Reply):
    """Sends the start of an answer and then one piece every so often, for a time that a test would not wait."""

    def __init__(self, start: bytes, piece: bytes) -> None:
        super().__init__(200, b"")
        self.start, self.piece = start, piece
        self.dropped = threading.Event()

    def send(self, handler: Any) -> None:
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 " + self.start)
        try:
            for _ in range(250):
                time.sleep(0.02)
                handler.wfile.write(self.piece)
        except ConnectionError:
            self.dropped.set()


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"2", b"0"),
        (b"200 OK\r\nX-Name: ", b"a"),
        (b"100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"200 OK\r\nContent-Length: 1000\r\n\r\n", b" "),
        (b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Name: trailer\r\n"),
    ],
    ids=["status", "header", "interim answers", "body", "chunk size", "chunks", "trailer"],
)
def test_a_server_that_drips(start: bytes, piece: bytes) -> None:
    drips = [Dripping(start, piece) for _ in range(2)]
    with Scripted(lambda number, body: drips[number]) as server:
        with pytest.raises(RetrievalError, match=r"gave no answer within 0\.2 s \(2 tries\)"):
            Remote(server.url, timeout=0.2, retries=1, backoff=0).search(["a"], 3)
        assert all(drip.dropped.wait(10) for drip in drips)


def test_a_connection_is_kept_and_each_answer_has_the_whole_time() -> None:
    ports = set()

    class Slow(Reply):
        def send(self, handler: Any) -> None:
            ports.add(handler.client_address)
            time.sleep(0.4)
            super().send(handler)

    with Scripted(lambda number, body: Slow(200, good(body).body)) as server:
        remote = Remote(server.url, timeout=1, retries=0)
        # 3 x 0.4 s are more than one request may take.
        assert [ids(remote.search([query], 3)) for query in "abc"] == [[["a"]], [["b"]], [["c"]]]
    assert len(ports) == 1


class Flood(Reply):
    """Sends blanks until nobody takes them, up to 1 GiB."""

    def send(self, handler: Any) -> None:
        handler.send_response(self.status)
        handler.send_header("Content-Length", str(2**30))
        handler.end_headers()
        for _ in range(2**10):
            handler.wfile.write(b" " * 2**20)


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_without_an_end(status: int) -> None:
    with Scripted(lambda number, body: Flood(status, b"")) as server:
        with pytest.raises(RetrievalError, match="answered with more than 4 MiB; is this url that of a retrieval"):
            Remote(server.url, retries=3, backoff=0).search(["a"], 3)
        with pytest.raises(RetrievalError, match="answered with more than 12 MiB"):
            Remote(server.url, retries=3, backoff=0).search(["a", "b", "c"], 4)
        assert len(server.requests) == 2


def test_an_answer_may_be_as_large_as_what_is_asked_for() -> None:
    # 9 MiB: within the 10 of two queries with five documents each, beyond the 8 of four each.
    hits = [[{"id": "1", "contents": "a" * (9 * 2**20)}], []]
    with Scripted(lambda number, body: Reply(200, json.dumps({"result": hits}).encode())) as server:
        remote = Remote(server.url, retries=0)
        assert ids(remote.search(["a", "b"], 5)) == [["1"], []]
        with pytest.raises(RetrievalError, match="answered with more than 8 MiB"):
            remote.search(["a", "b"], 4)


def test_a_compressed_answer_is_not_unpacked() -> None:
    def script(number: int, body: dict[str, Any]) -> Reply:
        return Reply(200, gzip.compress(good(body).body, mtime=0), Content_Encoding="gzip")

    with Scripted(script) as server, pytest.raises(RetrievalError, match="answered text that is not JSON"):
        Remote(server.url, retries=0).search(["a"], 3)
    assert [headers["Accept-Encoding"] for headers in server.headers] == ["identity"]


def test_an_answer_that_is_cut_is_asked_for_again() -> None:
    def script(number: int, body: dict[str, Any]) -> Reply:
        return good(body) if number else Reply(200, b'{"result": ', Content_Length="100", Connection="close")

    with Scripted(script) as server:
        assert ids(Remote(server.url, retries=1, backoff=0, timeout=5).search(["a"], 3)) == [["a"]]
        assert len(server.requests) == 2
    with Scripted(lambda number, body: script(0, body)) as server:
        with pytest.raises(RetrievalError, match=r"broke off \(.*\) \(2 tries\); see its log"):
            Remote(server.url, retries=1, backoff=0, timeout=5).search(["a"], 3)
        assert len(server.requests) == 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int) -> None:
    def script(number: int, body: dict[str, Any]) -> Reply:
        return Reply(status, b'{"error": "too\\nbusy"}') if number < 2 else good(body)

    tries = 1 if status == 500 else 2  # further ones
    with Scripted(lambda number, body: script(number + 2 - tries, body)) as server:
        assert ids(Remote(server.url, retries=2, backoff=0).search(["a"], 3)) == [["a"]]
        assert len(server.requests) == 1 + tries
    with Scripted(script) as server:
        with pytest.raises(RetrievalError, match=rf"answered {status} \(too busy\) \(2 tries\); see its log"):
            Remote(server.url, retries=1, backoff=0).search(["a"], 3)
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (422, b'{"error": "topk is 300"}', "answered 422 (topk is 300); correct what it names"),
        (422, b'{"detail": [{"loc": ["body"]}]}', "answered 422 ([{'loc': ['body']}]); correct what it names"),
        (404, b"Not\nfound", "answered 404 (Not found); correct the path of url"),
        (413, b"", "answered 413 (no reason given); lower batch_size"),
        (307, b"", "answered 307 (no reason given); is this url that of a retrieval server?"),
    ],
)
def test_what_stays_wrong_is_not_tried_again(status: int, body: bytes, message: str) -> None:
    with Scripted(lambda number, _: Reply(status, body, Location="/elsewhere")) as server:
        with pytest.raises(RetrievalError) as caught:
            Remote(server.url, retries=3, backoff=0).search(["a"], 3)
        assert len(server.requests) == 1
    assert str(caught.value) == f"the retrieval server {server.url}/retrieve {message}"


def test_our_own_refusal_reaches_the_user() -> None:
    with serving(MemoryRetriever(failing=["broken"])) as url:
        with pytest.raises(
            RetrievalError, match=r"answered 422 \(topk is 101; it must be a whole number from 1 to 100"
        ):
            Remote(url).search(["a"], 101)
        with pytest.raises(RetrievalError, match=r"answered 502 \(the search for 'broken' is scripted to fail"):
            Remote(url, retries=1, backoff=0).search(["a", "broken"], 3)


def test_pauses_double_vary_and_heed_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def script(number: int, body: dict[str, Any]) -> Reply:
        asked = {3: "9", 4: "3600", 5: "Wed, 21 Oct 2026 07:28:00 GMT"}
        return Reply(503, b"", Retry_After=asked.get(number, ""))

    state = random.getstate()
    with Scripted(script) as server, pytest.raises(RetrievalError, match="7 tries"):
        Remote(server.url, retries=6, backoff=0.5).search(["a"], 3)
    # After the n-th try at most 0.5 x 2^(n-1) s and at least half of it, or what the server asks for, up to 30 s.
    low, high = [0.25, 0.5, 1, 9, 30, 8], [0.5, 1, 2, 9, 30, 16]
    assert all(least <= pause <= most for least, pause, most in zip(low, pauses, high, strict=True))
    assert len(set(pauses)) == 6
    assert random.getstate() == state


def test_a_failed_server_is_followed_by_the_next_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    dead = f"http://127.0.0.1:{closed_port()}"
    with (
        Scripted(lambda number, body: Reply(500, b"")) as broken,
        Scripted(lambda number, body: good(body)) as working,
    ):
        remote = Remote([dead, broken.url, working.url], retries=0)
        assert all(ids(remote.search([query], 3)) == [[query]] for query in "abc")
        # Each of the three starts at another server: the dead, the broken and the working one.
        assert [body["queries"] for body in broken.requests] == [["a"], ["b"]]
        assert [body["queries"] for body in working.requests] == [["a"], ["b"], ["c"]]
        with pytest.raises(RetrievalError, match=r"\(2 tries\)"):
            Remote([dead, broken.url], retries=0).search(["a"], 3)
    assert pauses == []


def test_batches_go_to_several_servers_at_once() -> None:
    # A server answers only when the other has been asked too.
    both = threading.Barrier(2, timeout=10)

    def script(number: int, body: dict[str, Any]) -> Reply:
        both.wait()
        return good(body)

    with Scripted(script) as one, Scripted(script) as two:
        queries = [str(number) for number in range(8)]
        found = Remote([one.url, two.url], batch_size=2, retries=0).search(queries, 3)
        assert ids(found) == [[query] for query in queries]
        assert len(one.requests) == len(two.requests) == 2


def outcomes(remote: Remote, *queries: str) -> list[list[str] | type[RetrievalError]]:
    """Of a search that fails for some queries: ids, or OutageError or another RetrievalError."""
    with pytest.raises(PartialRetrievalError) as caught:
        remote.search(queries, 3)
    return [
        (OutageError if isinstance(result, OutageError) else RetrievalError)
        if isinstance(result, RetrievalError)
        else ids([result])[0]
        for result in caught.value.results
    ]


def refusing(status: int, *bad: str) -> Script:
    """A server that answers batches with one of these queries so."""
    return lambda _, body: Reply(status, b'{"error": "no"}') if {*bad} & {*body["queries"]} else good(body)


def test_one_failed_batch_leaves_the_others() -> None:
    with Scripted(refusing(422, "c")) as one, Scripted(refusing(422, "c")) as two:
        remote = Remote([one.url, two.url], batch_size=1)
        assert outcomes(remote, "a", "b", "c", "d") == [["a"], ["b"], RetrievalError, ["d"]]


@pytest.mark.parametrize("status", [400, 413, 422, 500])
def test_the_query_that_a_server_fails_at_is_found_by_halving(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with Scripted(refusing(status, "c")) as server:
        remote = Remote(server.url)
        found = outcomes(remote, *"ab", "", *"cdefgh")
        assert found == [["a"], ["b"], [], RetrievalError, ["d"], ["e"], ["f"], ["g"], ["h"]]
        sent = ["".join(body["queries"]) for body in server.requests]
        # A 500 may be a blip: it is tried once more, after the only pause.
        first = ["abcdefgh"] * (2 if status == 500 else 1)
        assert sent == [*first, "abcd", "ab", "cd", "c", "d", "efgh"]
        with pytest.raises(PartialRetrievalError, match=rf"answered {status} \(no\).* \(2 of 4 searches failed\)$"):
            remote.search(["c", "a", "c", "d"], 3)
    assert len(pauses) == (2 if status == 500 else 0)


def test_a_server_that_refuses_everything_is_soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    queries = [str(number) for number in range(256)]
    with Scripted(lambda number, body: Reply(500, b'{"error": "no"}')) as server:
        with pytest.raises(PartialRetrievalError, match=r"answered 500 \(no\) .*\(256 of 256 searches failed\)$"):
            Remote(server.url).search(queries, 3)
        assert len(server.requests) < 40
    assert len(pauses) == 1


def test_an_outage_while_halving_ends_it() -> None:
    def script(number: int, body: dict[str, Any]) -> Reply:
        if number in (0, 1):
            return Reply(422, b"")
        return good(body) if number == 2 else Reply(503, b"")

    with Scripted(script) as server:
        # abcd and ab are refused, a is answered; b meets an outage, and cd is not asked for.
        found = outcomes(Remote(server.url, retries=1, backoff=0), *"abcd")
        assert found == [["a"], OutageError, OutageError, OutageError]
        assert [body["queries"] for body in server.requests] == [[*"abcd"], [*"ab"], ["a"], ["b"], ["b"]]


@pytest.mark.parametrize("status", [502, 503, 504])
def test_an_outage_has_patience_after_the_first_answer_only(status: int) -> None:
    def script(number: int, body: dict[str, Any]) -> Reply:
        return good(body) if number in (2, 6) else Reply(status, b"")

    def patience() -> float:
        with pytest.raises(OutageError) as caught:
            remote.search(["a"], 3)
        return caught.value.patience

    with Scripted(script) as server:
        remote = Remote(server.url, retries=1, backoff=0, patience=7.5)
        assert patience() == 0.0  # two tries
        assert ids(remote.search(["a"], 3)) == [["a"]]
        assert [patience(), patience()] == [7.5, 7.5]  # two tries, and one while it is away
        assert ids(remote.search(["a"], 3)) == [["a"]]
        assert len(server.requests) == 7


def test_a_failing_query_behind_our_own_server_is_no_outage() -> None:
    with serving(MemoryRetriever([Document("1", "", "text")], {"a": ["1"], "b": ["1"]}, failing=["broken"])) as url:
        remote = Remote(url, backoff=0)
        assert outcomes(remote, "a", "broken", "b") == [["1"], RetrievalError, ["1"]]
        with pytest.raises(RetrievalError, match="'broken' is scripted to fail") as caught:
            remote.search(["broken"], 3)
        assert not isinstance(caught.value, OutageError)


def test_threads_share_a_client() -> None:
    with Scripted(lambda number, body: good(body)) as server:
        remote = Remote(server.url, batch_size=3)
        found: dict[int, list[list[str]]] = {}

        def search(thread: int) -> None:
            found[thread] = ids(remote.search([f"{thread}-{number}" for number in range(7)], 1))

        threads = [threading.Thread(target=search, args=(thread,)) for thread in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {thread: [[f"{thread}-{number}"] for number in range(7)] for thread in range(16)}


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "localhost", "ftp://host/retrieve", "http://", "http://host:port", "http://a b", "/x"]
)
def test_malformed_addresses_are_refused(url: str) -> None:
    for value in (url, ["http://127.0.0.1:8000", url]):
        with pytest.raises(ValueError, match=r"url is '.*'; give an address such as http://127.0.0.1:8000/retrieve"):
            Remote(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": []}, "url is an empty list; give the address of at least one"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"timeout": 0}, "timeout is 0; it must be a number of seconds above 0"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"retries": -1}, "retries is -1; it must be a number of at least 0"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"patience": -1}, "patience is -1; it must be a number of at least 0"),
        ({"backoff": -0.5}, "backoff is -0.5; it must be a number of at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Remote(**{"url": "http://127.0.0.1:8000", **settings})
    with pytest.raises(ValueError, match="top_k is 0"):
        Remote("http://127.0.0.1:8000").search(["a"], 0)


@pytest.mark.parametrize("several", [False, True])
def test_from_yaml(several: bool) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Retriever, "retriever")
    with Scripted(lambda number, body: good(body)) as server:
        url = f"[{server.url}, {server.url}]" if several else server.url
        config = f"{{class_path: calibadv.retrieval.remote.Remote, init_args: {{url: '{url}', top_k: 5}}}}"
        if several:
            config = config.replace("'", "")
        retriever = parser.instantiate(parser.parse_args([f"--retriever={config}"])).retriever
        assert retriever.top_k == 5
        assert ids(retriever.search(["a"], 5)) == [["a"]]
