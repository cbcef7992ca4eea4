"""A retriever that is away: training waits for it, and goes on as if nothing had been."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from agent.test_streaming import FILM, REPLIES, Unordered, first
from support.agents import ANSWER, SEARCH, play, retriever, scripted_agent
from support.fits import curves, files, fit, results
from support.serving import closed_port, serving
from transformers import AutoTokenizer

from calibadv.agent.episode import Agent
from calibadv.agent.patience import Waiting
from calibadv.cli.main import main
from calibadv.errors import OutageError, PartialRetrievalError, RetrievalError, StopRequestedError
from calibadv.interfaces import Retriever
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.retrieval import BM25, Cached, Remote
from calibadv.types import Completion, RolloutStatus, ScoredDocument

FAILED, ANSWERED = RolloutStatus.SEARCH_FAILED, RolloutStatus.ANSWERED


@pytest.fixture(scope="module")
def tokenizer(llama_folder: Path) -> AgentTokenizer:
    return AgentTokenizer(AutoTokenizer.from_pretrained(llama_folder))


@pytest.fixture(params=["in step", "streaming"])
def make(request: pytest.FixtureRequest, tokenizer: AgentTokenizer) -> Callable[..., Agent]:
    """An agent whose rollouts go in step, or each at its own pace."""

    def agent(replies: dict[str, list[list[str]]], search: Retriever, **limits: Any) -> Agent:
        made = scripted_agent(tokenizer, replies, search, **limits)
        return replace(made, engine=Unordered(made.engine, first)) if request.param == "streaming" else made

    return agent


class Away(Retriever):
    """Searches for 'film' meet an outage so many times; keeps what it was asked."""

    def __init__(self, times: int, patience: float = 60.0) -> None:
        self.retriever, self.times, self.patience = retriever(), times, patience
        self.top_k = self.retriever.top_k
        self.calls: list[list[str]] = []

    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        self.calls.append(list(queries))
        found = self.retriever.search(queries, top_k)
        if "film" not in queries or len(self.calls) > self.times:
            return found
        away = OutageError("it is away", self.patience)
        raise PartialRetrievalError([away if q == "film" else hits for q, hits in zip(queries, found, strict=True)])


def never() -> bool:
    return False


def unasked() -> bool:
    raise AssertionError("nothing is to be waited for")


class Server:
    """A retrieval server that can be stopped, and started on the same port."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.url = self.stack.enter_context(serving(retriever()))

    def stop(self) -> None:
        self.stack.close()

    def start(self) -> None:
        self.stack.enter_context(serving(retriever(), port=int(self.url.rpartition(":")[2])))


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def answered_once(url: str, **settings: Any) -> Remote:
    remote = Remote(url, top_k=2, **{"backoff": 0.0, **settings})
    assert remote.search(["capital"], 1)[0]
    return remote


def test_rollouts_of_an_outage_are_those_of_none(
    make: Callable[..., Agent], server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"max_searches": 3, "max_turn_tokens": 60}
    expected = play(make(REPLIES, retriever(), **limits), *REPLIES, samples=3)
    cached = Cached(answered_once(server.url))
    server.stop()
    looks = 0

    def start() -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:
            server.start()
        return False

    rollouts = play(make(REPLIES, cached, **limits), *REPLIES, samples=3, waiting=Waiting(60.0, start))
    assert rollouts == expected
    assert looks >= 2
    away, back = caplog.messages
    assert away.startswith(f"the retriever is away, waiting for at most 60 s: the retrieval server {server.url}")
    assert "is down (Connection refused)" in away
    assert back.startswith("the retriever is back after ")


def test_only_what_failed_is_asked_again(tokenizer: AgentTokenizer) -> None:
    search = Away(times=2)
    replies = {"a": [[SEARCH, ANSWER]], "b": [[FILM, ANSWER]]}
    rollouts = play(scripted_agent(tokenizer, replies, search), "a", "b", waiting=Waiting(60.0, never))
    assert [rollout.status for rollout in rollouts] == [ANSWERED, ANSWERED]
    assert search.calls == [["capital", "film"], ["film"], ["film"]]


def test_a_request_to_stop_ends_the_wait(make: Callable[..., Agent], server: Server) -> None:
    remote = answered_once(server.url)
    server.stop()
    looks = iter([False, False, True])
    with pytest.raises(StopRequestedError):
        play(make(REPLIES, remote), *REPLIES, waiting=Waiting(60.0, lambda: next(looks)))


class Hanging(Retriever):
    """Does not answer until it is released."""

    def __init__(self) -> None:
        self.top_k = 2
        self.released = Event()

    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        self.released.wait(30)
        return [[] for _ in queries]


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    made = Hanging()
    yield made
    made.released.set()


def test_a_request_to_stop_leaves_a_search_that_hangs(
    make: Callable[..., Agent], hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibadv.agent.patience._GRACE", 0.3)
    with pytest.raises(StopRequestedError, match=r"^asked to stop, and the retriever has not answered for \d s$"):
        play(make(REPLIES, hanging), *REPLIES, waiting=Waiting(60.0, lambda: True))


def test_a_search_that_is_only_slow_is_finished_after_a_request_to_stop(
    make: Callable[..., Agent], hanging: Hanging
) -> None:
    def stop() -> bool:
        hanging.released.set()
        return True

    rollouts = play(make({"a": [[SEARCH, ANSWER]]}, hanging), "a", waiting=Waiting(60.0, stop))
    assert [rollout.status for rollout in rollouts] == [ANSWERED]


def test_a_search_that_hangs_does_not_outlast_the_process_group(make: Callable[..., Agent], hanging: Hanging) -> None:
    with pytest.raises(RetrievalError, match=r"^the retriever has not answered for \d s$"):
        play(make(REPLIES, hanging), *REPLIES, waiting=Waiting(0.3, never))


@pytest.mark.parametrize(("patience", "cap"), [(0.3, 60.0), (60.0, 0.3)])
def test_patience_ends(make: Callable[..., Agent], server: Server, patience: float, cap: float) -> None:
    remote = answered_once(server.url, patience=patience)
    server.stop()
    with pytest.raises(RetrievalError, match=r"^the retriever was waited for, for \d s \(limit: 0\.3 s\): the retriev"):
        play(make(REPLIES, remote), *REPLIES, waiting=Waiting(cap, never))


def test_patience_is_that_of_all_outages_together(make: Callable[..., Agent], caplog: pytest.LogCaptureFixture) -> None:
    class Again(Away):
        def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
            self.times = 0 if len(self.calls) == 1 else 1000  # back at the second call only
            return super().search(queries, top_k)

    search = Again(times=1)
    waiting = Waiting(60.0, lambda: len(search.calls) == 3)
    with pytest.raises(StopRequestedError):
        play(make({"a": [[FILM, FILM, ANSWER]]}, search), "a", waiting=waiting)
    once, _, again = caplog.messages
    assert once == "the retriever is away, waiting for at most 60 s: it is away"
    left = re.fullmatch(r"the retriever is away, waiting for at most (\d+) s: it is away", again)
    assert left is not None
    assert int(left[1]) < 60  # a second is gone


@pytest.mark.parametrize("waiting", [Waiting(60.0, unasked), None])
def test_what_has_never_answered_fails_at_once(make: Callable[..., Agent], waiting: Waiting | None) -> None:
    mistyped = Remote(f"http://127.0.0.1:{closed_port()}", backoff=0)
    rollouts = play(make({"a": [[SEARCH, ANSWER]]}, mistyped), "a", samples=2, waiting=waiting)
    assert [rollout.status for rollout in rollouts] == [FAILED, FAILED]


@pytest.mark.parametrize(("patience", "waiting"), [(0.0, Waiting(60.0, unasked)), (60.0, None)])
def test_nothing_waits_without_patience_or_leave_to(
    make: Callable[..., Agent], patience: float, waiting: Waiting | None
) -> None:
    replies = {"a": [[SEARCH, ANSWER]], "b": [[FILM, ANSWER]]}
    rollouts = play(make(replies, Away(1000, patience)), "a", "b", waiting=waiting)
    assert [rollout.status for rollout in rollouts] == [ANSWERED, FAILED]


def test_an_error_of_the_engine_does_not_wait_for_the_retriever(tokenizer: AgentTokenizer) -> None:
    looks: list[bool] = []

    class Breaking(Unordered):
        def collect(self) -> dict[int, Completion]:
            if looks:
                raise RuntimeError("out of memory")
            return super().collect() if len(self.under_way) > 1 else {}

    def look() -> bool:
        looks.append(False)
        return False

    made = scripted_agent(tokenizer, {"a": [[FILM]], "b": [[SEARCH]]}, Away(1000))
    with pytest.raises(RuntimeError, match="out of memory"):
        play(replace(made, engine=Breaking(made.engine, first)), "a", "b", waiting=Waiting(3600.0, look))


# Runs of the command line.


class Interrupted(BM25):
    """Away at some searches, counted from 1, and back at the next."""

    def __init__(self, corpus: str, away: list[int], top_k: int = 2) -> None:
        super().__init__(corpus, top_k=top_k)
        self.away, self.searches = away, 0

    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        self.searches += 1
        if self.searches in self.away:
            raise OutageError("it is away", patience=60.0)
        return super().search(queries, top_k)


class Unlucky(BM25):
    """Fails so many of each hundred queries that it gets, spread evenly: 37 has no common factor with 100."""

    def __init__(self, corpus: str, percent: int, top_k: int = 2) -> None:
        super().__init__(corpus, top_k=top_k)
        self.percent, self.queries = percent, 0

    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        results: list[list[ScoredDocument] | RetrievalError] = []
        for hits in super().search(queries, top_k):
            results.append(RetrievalError("unlucky") if self.queries * 37 % 100 < self.percent else hits)
            self.queries += 1
        raise PartialRetrievalError(results)


def overlay(folder: Path, name: str, **arguments: Any) -> tuple[str, ...]:
    path = folder / f"{name}.yaml"
    given = {"corpus": "embedded", **arguments}
    path.write_text(f"model: {{retriever: {{class_path: {__name__}.{name}, init_args: {given}}}}}")
    return ("--config", str(path))


def test_a_run_with_outages_is_that_of_none(tmp_path: Path) -> None:
    """Away in the validation before training, and in a training step."""
    words = ("--model.rollout_steps", "2", "--rollouts.every_n_rollout_steps", "1")
    assert fit(tmp_path, "none", *words) == 0
    assert fit(tmp_path, "some", *overlay(tmp_path, "Interrupted", away=[1, 6]), *words) == 0
    assert results(tmp_path / "some") == results(tmp_path / "none")
    assert curves(tmp_path / "some") == curves(tmp_path / "none")
    rollouts = [
        {name: data for name, data in files(tmp_path / run).items() if name.startswith("rollouts/")}
        for run in ("some", "none")
    ]
    assert rollouts[0] == rollouts[1]
    assert rollouts[0]


@pytest.mark.parametrize("percent", [1, 20])
def test_a_run_goes_on_where_some_searches_fail(
    percent: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model.rollout_steps", "3", "--data.validation_questions", "40", "--trainer.val_check_interval", "3")
    assert fit(tmp_path, "run", *overlay(tmp_path, "Unlucky", percent=percent), *words) == 0
    content = results(tmp_path / "run")
    before = content["validations"][0]
    assert before["search_failed"] >= 1
    assert before["search_failed"] + before["count"] == 40
    missing = f"{before['search_failed']:.0f} of 40 questions have no result"
    assert any(line.startswith(f"validation at step 0: {missing}, since") for line in caplog.messages)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step    0 ") and line.endswith(missing) for line in lines)
    assert any("searches failed, their rollouts are left out: unlucky" in line for line in caplog.messages)


def test_a_run_stops_where_all_searches_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "run", *overlay(tmp_path, "Unlucky", percent=100), "--model.rollout_steps", "3") != 0
    assert "4 of 4 searches of step 0 failed (limit: half of them)" in capsys.readouterr().err


def test_an_evaluation_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ("--config", "quickstart", *overlay(tmp_path, "Unlucky", percent=20), "--data.validation_questions", "40")
    assert main(["validate", *words, "--run.root", str(tmp_path / "runs")]) == 0
    [missing] = [line.strip() for line in capsys.readouterr().out.splitlines() if "have no result" in line]
    assert re.fullmatch(r"[1-9]\d* of 40 questions have no result", missing)
    assert any(missing in line for line in caplog.messages)


def test_an_evaluation_does_not_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--config", "quickstart", *overlay(tmp_path, "Interrupted", away=[1]), "--data.validation_questions", "4")
    assert main(["validate", *words, "--run.root", str(tmp_path / "runs")]) != 0
    assert "4 of 4 searches of step 0 failed" in capsys.readouterr().err
