"""Demonstrations of the embedded world: by an agent that knows how to search, and by one that often goes wrong.

Each world is fresh, so that only copying from the context can be learned. The noisy agent's mistakes are what training
has to repair: those that it makes in most cases of a kind (a wrong fact of a hard relation, an answer one hop too
early) stay under greedy decoding, the others only show when the policy is sampled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from random import Random

from calibadv.demonstrations.play import Script, play
from calibadv.numerics.ranking import best_rows
from calibadv.protocol.search import SearchProtocol
from calibadv.retrieval.index.bm25 import import_bm25s
from calibadv.types import Document, Question, Rollout
from calibadv.world.vocabulary import KINDS
from calibadv.world.world import HOP_SHARES, RelationPath, build_documents, build_facts, find_paths

PER_WORLD = 128
"""Demonstrations per world."""
# Relations whose final fact the noisy agent mostly gets wrong.
_HARD_RELATIONS = frozenset({"composer", "publisher", "founder", "hometown", "mayor", "president"})
_TOP_K = 2
PROTOCOL = SearchProtocol(prepend_think=False, template="short", chat_template="never")


@dataclass(frozen=True, slots=True)
class Noise:
    """Probabilities of the scripted agent's mistakes; with all of them 0 it is clean."""

    wrong_query: float = 0.25
    """A search turn asks for something else."""
    wrong_extraction: float = 0.15
    """A search turn's result is misread."""
    early_stop: float = 0.05
    """A turn answers with what is known so far."""
    broken_format: float = 0.03
    """A turn breaks the format."""
    hard_relation: float = 0.65
    """The final fact of a hard relation is mistaken for the other fact of the document."""
    third_hop: float = 0.5
    """A question of three hops is answered after two."""


CLEAN = Noise(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class WorldSearch:
    """BM25 over titles and texts of the documents of one small world."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self._index = import_bm25s().BM25()
        self._index.index([_search_words(f"{d.title} {d.text}") for d in documents], show_progress=False)

    def search(self, query: str, top_k: int) -> list[Document]:
        """Find the best documents."""
        known = self._index.get_tokens_ids(_search_words(query))
        if not known:
            return []
        return [self._documents[row] for row in best_rows(self._index.get_scores_from_ids(known), top_k)]


def demonstrate(seed: int, noise: Noise) -> Iterator[Rollout]:
    """Generate demonstrations without end, in a new world after every 128."""
    for number in count():
        key = f"warm start {seed} {number}"
        rng = Random(key)
        facts = build_facts(key)
        search = WorldSearch(build_documents(key, facts))
        paths = {hops: find_paths(facts, hops) for hops in HOP_SHARES}
        for sample, hops in enumerate(rng.choices(list(HOP_SHARES), list(HOP_SHARES.values()), k=PER_WORLD)):
            path = rng.choice(paths[hops])
            agent = _ScriptedAgent(path, facts, noise, rng)
            question = Question(f"{key} {sample}", path.question, [path.entities[-1]])
            yield play(agent.act(), question, partial(search.search, top_k=_TOP_K), PROTOCOL)


class _ScriptedAgent:
    """Follows the path of a question, one search per relation, and makes mistakes at random.

    It does not notice them: it goes on from whatever the search returned.
    """

    def __init__(self, path: RelationPath, facts: dict[str, dict[str, str]], noise: Noise, rng: Random) -> None:
        self.path = path
        self._facts = facts
        self._noise = noise
        self._rng = rng

    def act(self) -> Script:
        """Search and answer."""
        known = [self.path.entities[0]]
        stop = 2 if len(self.path.relations) == 3 and self._happens(self._noise.third_hop) else 3
        for turn, relation in enumerate(self.path.relations[:stop]):
            if turn and self._happens(self._noise.early_stop):
                break
            documents = yield self._write(self._think(turn, known), "search", self._query(known, relation))
            hard = relation in _HARD_RELATIONS and turn == len(self.path.relations) - 1
            known.append(self._read(documents, known[-1], relation, hard))
        relation = self.path.relations[len(known) - 2]
        yield self._write(f"now the {relation} is known , so answer {known[-1]}", "answer", known[-1])

    def _think(self, turn: int, known: list[str]) -> str:
        # Thinks of one rollout share few words in the same places: step correctness is 0 for one that repeats another.
        relation = self.path.relations[turn]
        if turn == 0:
            return f"first find the {relation} of {known[0]}"
        if turn == 1:
            return f"{self.path.relations[0]} is {known[1]} , then look for its {relation}"
        return f"it has {self.path.relations[1]} {known[2]} so next search the {relation}"

    def _query(self, known: list[str], relation: str) -> str:
        entity = known[-1]
        if not self._happens(self._noise.wrong_query):
            return f"{relation} of {entity}"
        parts = entity.split()
        mistake = self._rng.randrange(3)
        if mistake == 0 and len(parts) == 2:
            return f"{relation} of {self._rng.choice(parts)}"
        if mistake == 1 and len(known) > 1:
            return f"{relation} of {known[-2]}"
        index = self._rng.randrange(len(parts))
        parts[index] = self._rng.choice(KINDS[self._kind(entity)].parts[index])
        return f"{relation} of {' '.join(parts)}"

    def _read(self, documents: Sequence[Document], entity: str, relation: str, hard: bool) -> str:
        if not documents:
            return entity
        titles = [document.title for document in documents]
        facts = self._facts[entity if entity in titles else titles[0]]
        others = [value for name, value in facts.items() if name != relation]
        if (hard and self._happens(self._noise.hard_relation)) or relation not in facts:
            return self._rng.choice(others)
        if self._happens(self._noise.wrong_extraction):
            return self._rng.choice([*others, *self._facts[titles[-1]].values()])
        return facts[relation]

    def _write(self, think: str, action: str, content: str) -> str:
        opening = ["<think>", f"{think}", "</think>", f"<{action}>"]
        if self._happens(self._noise.broken_format):
            del opening[self._rng.choice((2, 3))]
        return " ".join([*opening, content, f"</{action}>"])

    def _kind(self, title: str) -> str:
        return next(kind.name for kind in KINDS.values() if set(kind.relations) == set(self._facts[title]))

    def _happens(self, probability: float) -> bool:
        return self._rng.random() < probability


def _search_words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w\w+", text.lower()) if word not in ("of", "and", "is", "the")]
