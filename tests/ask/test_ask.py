"""Asking an agent: what it does is what a validation records, shown as it comes."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import pytest
from rich.console import Console
from support.browser import Browser

from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.rollout import Draws, run_rollouts
from calibadv.agent.tools import SearchTool
from calibadv.ask.session import Session
from calibadv.ask.terminal import show
from calibadv.ask.web import make_server, page
from calibadv.cli.main import main
from calibadv.engines import TransformersEngine
from calibadv.policy.loading import load_policy
from calibadv.protocol import SearchProtocol
from calibadv.retrieval import BM25
from calibadv.types import Question
from calibadv.world import embedded_world, policy_folder

QUESTIONS = [question.question for question in embedded_world().questions["test"][:6]]
PROTOCOL = SearchProtocol(template="short", max_searches=3, max_turn_tokens=36, max_rollout_tokens=512)


@pytest.fixture(scope="module")
def agent() -> Agent:
    policy = load_policy("embedded")
    engine = TransformersEngine()
    engine.sync(policy)
    return Agent(engine, Environment([SearchTool(BM25("embedded", top_k=2))]), PROTOCOL, policy.tokenizer)


@pytest.fixture(scope="module")
def session(agent: Agent) -> Session:
    return Session(agent, load_policy("embedded"))


def test_events_are_the_rollout_of_a_validation(agent: Agent, session: Session) -> None:
    asked = [Question(f"q{n}", text, ["x"]) for n, text in enumerate(QUESTIONS)]
    expected = run_rollouts(asked, agent, Draws(seed=0, step=0, samples=1, temperature=0.0))
    for rollout in expected:
        events = list(session.ask(rollout.question.question))
        end = events[-1]
        assert end.kind == "end"
        assert end.text == rollout.status
        assert [s["text"] for s in end.content["segments"]] == [s.text for s in rollout.segments]
        searches = [event.text for event in events if event.kind == "search"]
        assert searches == [m.calls[0].arguments["query"] for m in rollout.messages if m.calls]
        shown = [[d["id"] for d in event.content] for event in events if event.kind == "documents"]
        assert shown == [[d.id for d in documents or ()] for documents in rollout.turn_documents]
        answers = [event.text for event in events if event.kind == "answer"]
        assert answers == [m.answer for m in rollout.messages if m.answer is not None]
        said = "".join(event.text for event in events if event.kind == "think")
        assert said == "".join(message.think for message in rollout.messages)


def test_the_terminal_shows_the_steps(session: Session) -> None:
    out = io.StringIO()
    show(session.ask(QUESTIONS[0]), Console(file=out, width=100))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("think   ")
    assert lines[1].startswith("search  ")
    assert lines[-1].startswith("answer  ")
    assert any(line.startswith("  ") for line in lines)


@contextmanager
def serving(session: Session) -> Iterator[int]:
    server = make_server(session, 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def request(port: int, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    found = response.status, response.read()
    connection.close()
    return found


def test_the_page_streams_events(session: Session) -> None:
    with serving(session) as port:
        status, body = request(port, "GET", "/")
        assert (status, body.decode()) == (200, page())
        status, body = request(port, "POST", "/ask", QUESTIONS[0])
        events = [json.loads(line) for line in body.splitlines()]
        assert status == 200
        assert events[0]["kind"] == "think"
        assert events[-1]["kind"] == "end"
        status, body = request(port, "POST", "/ask", "word " * 600)
        assert [json.loads(line)["kind"] for line in body.splitlines()] == ["error"]  # a prompt that is too long


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/other", {}),
        ("POST", "/other", {}),
        ("GET", "/", {"Host": "evil.example"}),
        ("POST", "/ask", {"Host": "evil.example"}),
        ("POST", "/ask", {"Origin": "http://evil.example"}),
    ],
)
def test_a_page_from_elsewhere_reaches_nothing(
    session: Session, method: str, path: str, headers: dict[str, str]
) -> None:
    with serving(session) as port:
        assert request(port, method, path, "x" if method == "POST" else None, **headers)[0] == 404


def test_the_page_loads_nothing_from_outside() -> None:
    assert "default-src 'none'" in page()
    assert "http://" not in page()
    assert "https://" not in page()
    assert "innerHTML" not in page()  # all text is escaped


def test_a_browser_asks_by_keyboard_and_shows_the_steps(session: Session, chromium: str, tmp_path: Path) -> None:
    with serving(session) as port, closing(Browser(chromium, tmp_path, width=500)) as browser:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.type(f"{QUESTIONS[0]} <b>bold</b>")
        browser.wait_for("document.querySelector('article') && !document.querySelector('.waiting')")
        assert browser.run("document.querySelector('article h2').textContent") == f"{QUESTIONS[0]} <b>bold</b>"
        assert browser.run("document.querySelectorAll('b').length") == 0  # all text is escaped
        searches = browser.run("document.querySelectorAll('.search').length")
        assert browser.run("document.querySelectorAll('.think').length") == searches + 1
        assert browser.run("document.querySelectorAll('details:not([open])').length") == 2 * searches
        assert browser.run("document.querySelectorAll('.answer').length") == 1
        assert browser.run("document.activeElement.id") == "question"  # for the next one
        assert browser.run("document.documentElement.scrollWidth") <= 500


def test_a_question_can_be_linked_to(session: Session, chromium: str, tmp_path: Path) -> None:
    with serving(session) as port, closing(Browser(chromium, tmp_path)) as browser:
        browser.open(f"http://127.0.0.1:{port}/#{quote(QUESTIONS[1])}")
        browser.wait_for("document.querySelector('.answer, .note')")
        assert browser.run("document.querySelector('h2').textContent") == QUESTIONS[1]


MODEL = ("--model", str(policy_folder()), "--retriever", "quickstart")


def test_the_command_takes_the_question_first_or_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", QUESTIONS[0], *MODEL, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["ask", "--json", *MODEL, QUESTIONS[0]]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert first["question"] == QUESTIONS[0]


def test_questions_are_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed = iter([QUESTIONS[0], ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main(["ask", *MODEL]) == 0
    assert "think   " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["who?", "--model", str(policy_folder())], "there is nothing to search; give --index DIR or --retriever"),
        (["who?", "--retriever", "quickstart"], "there is nobody to ask; give --model"),
        (["who?", "--model", "nowhere", "--retriever", "quickstart"], "'nowhere' does not exist"),
        ([*MODEL, "--json"], "--json prints the answer to one question"),
        ([*MODEL, "--web", "--port", "99999"], "port 99999 cannot be used"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert main(["ask", *words]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
