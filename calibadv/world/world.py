"""Synthetic worlds: passages about made-up entities, and questions of one to three hops about them.

Every draw is a blake2b hash of the world's key and of what is drawn, so a world is the same on every machine and under
every version of Python and numpy, and no draw depends on another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice, product

from calibadv.types import Document, Question
from calibadv.world.vocabulary import KINDS, SENTENCES, Kind

SPLITS = {"train": 2000, "validation": 200, "test": 200}
"""Questions of each split."""
HOP_SHARES = {1: 15, 2: 55, 3: 30}
"""Per cent of the questions, by number of hops."""


@dataclass(frozen=True, slots=True)
class World:
    """Passages and questions about them.

    Attributes:
        documents: one per entity, entities of one kind next to each other.
        facts: by title of a document, then by relation: the entity that it leads to.
        questions: by split: train, validation, test; no two share both entity and relation path.
    """

    documents: tuple[Document, ...]
    facts: dict[str, dict[str, str]]
    questions: dict[str, list[Question]]


@dataclass(frozen=True, slots=True)
class RelationPath:
    """The relations that a question follows, and the entities on the way."""

    relations: tuple[str, ...]  # in the order in which they are followed
    entities: tuple[str, ...]  # the one that the question names, then that after each relation; the last is the answer

    @property
    def question(self) -> str:
        """The question, e.g. ``what is the country of the birthplace of Bala Kelsen ?``."""
        steps = " of ".join(f"the {relation}" for relation in reversed(self.relations))
        return f"what is {steps} of {self.entities[0]} ?"


def build_world(seed: int) -> World:
    """Build the world of a seed; 0 is the one that a config calls ``embedded``."""
    key = f"world {seed}"
    facts = build_facts(key)
    documents = build_documents(key, facts)
    ids = {document.title: document.id for document in documents}
    questions: dict[str, list[Question]] = {split: [] for split in SPLITS}
    for hops, share in HOP_SHARES.items():
        paths = {path.question: path for path in find_paths(facts, hops)}
        shuffled = iter(_shuffle(paths, key, "paths"))
        for split, size in SPLITS.items():
            chosen = islice(shuffled, size * share // 100)
            questions[split].extend(_make_question(paths[question], ids) for question in chosen)
    return World(documents, facts, {split: _assign_ids(drawn, key, split) for split, drawn in questions.items()})


def build_facts(key: str) -> dict[str, dict[str, str]]:
    """Draw the entities of a world and the facts about them: by entity, then by relation."""
    titles = {kind.name: _draw_titles(kind, key) for kind in KINDS.values()}
    facts = {
        title: {
            relation: titles[target][_draw(key, title, relation) % len(titles[target])]
            for relation, target in kind.relations.items()
        }
        for kind in KINDS.values()
        for title in titles[kind.name]
    }
    # Titles are drawn in a random order already.
    for country, city in zip(titles["country"], titles["city"], strict=False):
        facts[country]["capital"] = city
        facts[city]["country"] = country
    return facts


def build_documents(key: str, facts: dict[str, dict[str, str]]) -> tuple[Document, ...]:
    """Write the passage of each entity, in one of two sentences."""
    ids = [f"{kind.name}-{number}" for kind in KINDS.values() for number in range(kind.count)]
    documents = []
    for document_id, (title, relations) in zip(ids, facts.items(), strict=True):
        (first, first_value), (second, second_value) = relations.items()
        sentence = SENTENCES[_draw(key, title, "sentence") % len(SENTENCES)]
        text = sentence.format(
            name=title, first=first, first_value=first_value, second=second, second_value=second_value
        )
        documents.append(Document(document_id, title, text))
    return tuple(documents)


def find_paths(facts: dict[str, dict[str, str]], hops: int) -> list[RelationPath]:
    """All paths with this number of relations that never meet an entity twice."""

    def extend(path: RelationPath) -> Iterator[RelationPath]:
        if len(path.relations) == hops:
            yield path
            return
        for relation, entity in facts[path.entities[-1]].items():
            if entity not in path.entities:
                yield from extend(RelationPath((*path.relations, relation), (*path.entities, entity)))

    return [path for title in facts for path in extend(RelationPath((), (title,)))]


def _draw(*key: object) -> int:
    """A random number that depends on the key alone."""
    digest = blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _shuffle(texts: Iterable[str], *key: object) -> list[str]:
    """Shuffle texts; the order depends on the key and the texts alone, not on the order given."""
    return sorted(texts, key=lambda text: _draw(*key, text))


def _draw_titles(kind: Kind, key: str) -> list[str]:
    names = [" ".join(parts) for parts in product(*kind.parts)]
    return _shuffle(names, key, kind.name)[: kind.count]


def _make_question(path: RelationPath, ids: dict[str, str]) -> Question:
    hops = len(path.relations)
    evidence = list(path.entities[:-1])
    return Question(
        id="",
        question=path.question,
        golden_answers=[path.entities[-1]],
        data_source=f"world-{hops}hop",
        metadata={"hops": hops, "supporting_ids": [ids[title] for title in evidence], "supporting_titles": evidence},
    )


def _assign_ids(questions: list[Question], key: str, split: str) -> list[Question]:
    # Mixes the hop counts, so that the first questions of a split are a fair sample of it.
    by_text = {question.question: question for question in questions}
    mixed = [by_text[text] for text in _shuffle(by_text, key, split)]
    for number, question in enumerate(mixed):
        question.id = f"{split}-{number}"
    return mixed
