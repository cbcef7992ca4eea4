"""The embedded world, its tokenizer, the demonstrations and the shipped policy."""

from __future__ import annotations

import json
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.rollout import Draws, run_rollouts
from calibadv.agent.tools import SearchTool
from calibadv.engines.transformers import TransformersEngine
from calibadv.policy.loading import load_policy
from calibadv.policy.tokenizer import TAGS, AgentTokenizer
from calibadv.protocol.search import SearchProtocol
from calibadv.retrieval import BM25
from calibadv.rewards.answer import f1
from calibadv.sft.embedded import policy
from calibadv.types import Question, ToolResult
from calibadv.world import build_world, command, embedded_world, policy_folder
from calibadv.world.tokenizer import build_tokenizer
from calibadv.world.vocabulary import KINDS

BARE = SearchProtocol(prepend_think=False)
ALL_QUESTIONS = [question for split in embedded_world().questions.values() for question in split]


def relations_in_order(question: Question) -> list[str]:
    """The relations to follow, read from the text: what is the R2 of the R1 of X ?"""
    steps = question.question.removeprefix("what is ").split(" of ")[:-1]
    return [step.removeprefix("the ") for step in reversed(steps)]


def start_of(question: Question) -> str:
    return question.question.removesuffix(" ?").split(" of ")[-1]


def test_world_is_the_same_everywhere() -> None:
    # Recorded once; any other value means that users on another machine or version get other questions.
    world = build_world(0)
    text = repr([(d.id, d.title, d.text) for d in world.documents])
    asked = repr([(q.id, q.question, q.golden_answers) for split in world.questions.values() for q in split])
    assert blake2b((text + asked).encode(), digest_size=8).hexdigest() == "0f6a042793d59bec"


def test_worlds_of_other_seeds_differ() -> None:
    assert build_world(1).documents != build_world(0).documents


def test_sizes() -> None:
    world = embedded_world()
    assert {split: len(questions) for split, questions in world.questions.items()} == {
        "train": 2000,
        "validation": 200,
        "test": 200,
    }
    kinds = Counter(document.id.split("-")[0] for document in world.documents)
    assert kinds == {"film": 90, "book": 60, "company": 60, "band": 60, "person": 180, "city": 110, "country": 40}
    assert len({document.title for document in world.documents}) == 600
    assert len({question.id for question in ALL_QUESTIONS}) == 2400


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_hop_shares(split: str) -> None:
    questions = embedded_world().questions[split]
    sources = Counter(question.data_source for question in questions)
    assert {source: count * 100 // len(questions) for source, count in sources.items()} == {
        "world-1hop": 15,
        "world-2hop": 55,
        "world-3hop": 30,
    }


def test_splits_are_disjoint() -> None:
    # The text of a question is its entity and relation path.
    assert len({question.question for question in ALL_QUESTIONS}) == 2400


def test_supporting_documents_are_the_path_of_evidence() -> None:
    by_id = {document.id: document for document in embedded_world().documents}
    for question in ALL_QUESTIONS:
        gold = [by_id[document_id] for document_id in question.metadata["supporting_ids"]]
        titles = [document.title for document in gold]
        assert titles == question.metadata["supporting_titles"]
        assert titles[0] == start_of(question)
        assert len(gold) == len(relations_in_order(question)) == question.metadata["hops"]
        for document, relation, found in zip(
            gold, relations_in_order(question), [*titles[1:], *question.golden_answers], strict=True
        ):
            assert f"{relation} {found}" in document.text


def test_name_parts_are_shared_so_that_a_dropped_part_is_ambiguous() -> None:
    people = [document.title for document in embedded_world().documents if document.id.startswith("person")]
    last_names = Counter(name.split()[1] for name in people)
    assert sum(count > 1 for count in last_names.values()) > 0.8 * len(last_names)


def test_capitals_lie_in_their_countries() -> None:
    facts = embedded_world().facts
    countries = [title for title, told in facts.items() if "capital" in told]
    assert len(countries) == 40
    assert all(facts[facts[country]["capital"]]["country"] == country for country in countries)


def test_a_script_that_searches_answers_the_questions() -> None:
    world = embedded_world()
    retriever = BM25(corpus="embedded", top_k=2)
    questions = world.questions["validation"] + world.questions["test"]
    at = [start_of(question) for question in questions]
    for turn in range(3):
        asked = [
            f"{relations_in_order(q)[turn]} of {entity}" if turn < q.metadata["hops"] else entity
            for q, entity in zip(questions, at, strict=True)
        ]
        found = retriever.search(asked, 2)
        for row, question in enumerate(questions):
            if turn < question.metadata["hops"]:
                seen = [scored.document.title for scored in found[row]]
                facts = world.facts[at[row] if at[row] in seen else seen[0]]
                at[row] = facts.get(relations_in_order(question)[turn], "")
    answered = [[answer] == q.golden_answers for q, answer in zip(questions, at, strict=True)]
    assert sum(answered) >= 0.95 * len(questions)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_tokenizer_knows_every_word(seed: int) -> None:
    tokenizer = AgentTokenizer(build_tokenizer())
    unknown = tokenizer.backend.unk_token_id
    world = build_world(seed)
    protocol = SearchProtocol(template="short")
    for split in world.questions.values():
        for question in split:
            assert unknown not in protocol.prompt_ids(question.question, tokenizer)
            assert unknown not in tokenizer.encode(question.golden_answers[0])
    for start in range(0, 600, 10):
        assert unknown not in tokenizer.encode(
            protocol.render([ToolResult(tuple(world.documents[start : start + 10]))])
        )


@given(st.lists(st.sampled_from([*TAGS, "director", "of", "Bala", ".", "(", "10"])))
@settings(max_examples=50)
def test_tokenizer_returns_tags_and_words(pieces: list[str]) -> None:
    tokenizer = AgentTokenizer(build_tokenizer())
    text = " ".join(pieces)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("\n".join(pieces)) == tokenizer.encode(text)


def test_tokenizer_loads_again_as_the_same() -> None:
    loaded = AutoTokenizer.from_pretrained(policy_folder(), local_files_only=True)
    built = build_tokenizer()
    assert loaded.get_vocab() == built.get_vocab()
    text = "\n\n".join([*TAGS, "Doc 1(Title: Bala Dorsen) unheard words."])
    assert loaded.encode(text) == built.encode(text)
    assert loaded.decode(loaded.encode(text)) == " ".join([*TAGS, "Doc 1 ( Title : Bala Dorsen ) <unk> <unk> ."])
    assert set(TAGS).isdisjoint(loaded.all_special_tokens)


def test_shipped_policy_is_an_ordinary_small_model() -> None:
    model = AutoModelForCausalLM.from_pretrained(policy_folder(), local_files_only=True)
    assert model.num_parameters() == pytest.approx(349_056, rel=0.05)
    assert model.config.vocab_size == len(build_tokenizer())
    assert (policy_folder() / "model.safetensors").stat().st_size < 1_600_000


def test_shipped_policy_leaves_room_to_improve() -> None:
    # What the quickstart starts from: greedy F1 near 0.5, in the valid format.
    policy = load_policy("embedded")
    engine = TransformersEngine()
    engine.sync(policy)
    protocol = SearchProtocol(template="short", max_searches=3, max_turn_tokens=36)
    agent = Agent(engine, Environment([SearchTool(BM25(corpus="embedded", top_k=2))]), protocol, policy.tokenizer)
    questions = embedded_world().questions["validation"]
    rollouts = run_rollouts(questions, agent, Draws(seed=0, step=0, samples=1, temperature=0.0))
    assert sum(rollout.format_valid for rollout in rollouts) >= 0.9 * len(rollouts)
    answers = [rollout.messages[-1].answer for rollout in rollouts]
    scores = [f1(answer, q.golden_answers) for answer, q in zip(answers, questions, strict=True)]
    assert 0.42 < sum(scores) / len(scores) < 0.62


def test_export_writes_files_in_the_fields_formats(tmp_path: Path) -> None:
    command.export(tmp_path / "world", seed=0)
    lines = (tmp_path / "world" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    first = embedded_world().documents[0]
    assert json.loads(lines[0]) == {"id": first.id, "contents": f'"{first.title}"\n{first.text}'}
    assert len(lines) == 600
    questions = (tmp_path / "world" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Question(**json.loads(line)) for line in questions] == embedded_world().questions["validation"]
    assert BM25(corpus=str(tmp_path / "world" / "corpus.jsonl"), top_k=1).search([first.title], 1)[0]


def test_commands_leave_a_folder_alone_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for make in (command.export, policy):
        with pytest.raises(ValueError, match="not an empty folder"):
            make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_every_relation_belongs_to_one_kind() -> None:
    # A relation names one kind, so that a question can be read without knowing the kind of its entity.
    relations = Counter(relation for kind in KINDS.values() for relation in kind.relations)
    assert set(relations.values()) == {1}
