"""Demonstrations of the embedded world."""

from __future__ import annotations

from itertools import islice

from rapidfuzz.distance import Levenshtein

from calibadv.demonstrations.embedded import CLEAN, PROTOCOL, Noise, WorldSearch, demonstrate
from calibadv.retrieval import BM25
from calibadv.types import Question, Rollout
from calibadv.world import embedded_world


def first_step(question: Question) -> str:
    """The first query of a question: what is the R2 of the R1 of X ?"""
    steps = question.question.removeprefix("what is ").removesuffix(" ?").split(" of ")
    return f"{steps[-2].removeprefix('the ')} of {steps[-1]}"


def messages(rollout: Rollout) -> list[str]:
    return [segment.text for segment in rollout.policy_segments]


def test_own_search_finds_what_the_retriever_finds() -> None:
    world = embedded_world()
    queries = [first_step(question) for question in world.questions["test"]]
    search = WorldSearch(world.documents)
    theirs = [[s.document.id for s in found] for found in BM25(corpus="embedded", top_k=2).search(queries, 2)]
    assert [[document.id for document in search.search(query, 2)] for query in queries] == theirs


def test_own_search_finds_nothing_for_unknown_words() -> None:
    assert WorldSearch(embedded_world().documents).search("of nothing known", 2) == []


def test_clean_demonstrations_are_valid_and_right() -> None:
    demonstrations = list(islice(demonstrate(0, CLEAN), 256))
    for rollout in demonstrations:
        assert rollout.format_valid
        answer = rollout.messages[-1].answer
        assert [answer] == rollout.question.golden_answers
        assert answer is not None
        assert answer in rollout.segments[-2].text  # what the last search showed
    assert {len(rollout.messages) for rollout in demonstrations} == {2, 3, 4}


def test_thinks_of_a_clean_demonstration_are_dissimilar() -> None:
    # Step correctness is 0 where two thinks of a rollout have word similarity above 0.5.
    for rollout in islice(demonstrate(1, CLEAN), 256):
        thinks = [message.think.split() for message in rollout.messages]
        for later, think in enumerate(thinks):
            assert all(Levenshtein.normalized_similarity(think, earlier) <= 0.5 for earlier in thinks[:later])


def test_noisy_demonstrations_break_the_format_and_stop_early() -> None:
    rollouts = list(islice(demonstrate(0, Noise()), 1024))
    invalid = sum(not PROTOCOL.is_valid(rollout.messages) for rollout in rollouts) / len(rollouts)
    # 3 % of 2 to 4 turns: between 1 - 0.97**2 = 0.06 and 1 - 0.97**4 = 0.11.
    assert 0.04 < invalid < 0.13
    clean = islice(demonstrate(0, CLEAN), 1024)
    assert sum(len(r.messages) for r in rollouts) < 0.95 * sum(len(r.messages) for r in clean)  # early stops


def test_demonstrations_are_a_function_of_their_seed() -> None:
    first = [messages(rollout) for rollout in islice(demonstrate(5, Noise()), 40)]
    assert first == [messages(rollout) for rollout in islice(demonstrate(5, Noise()), 40)]
    assert first != [messages(rollout) for rollout in islice(demonstrate(6, Noise()), 40)]
