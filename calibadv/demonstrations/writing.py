"""Demonstrations of many questions, with a count of those that had to be left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from calibadv.agent.episode import cut_documents
from calibadv.demonstrations.play import Search, play
from calibadv.demonstrations.scripted import PHRASINGS, LeftOutError, Style, search_script
from calibadv.interfaces import Protocol, Retriever
from calibadv.io.progress_bar import progress_bar
from calibadv.types import Document, Question, Rollout, ToolResult

# Words that a think quotes: fewer where a message would be too long.
_QUOTED_WORDS = (14, 10, 6)

CountTokens = Callable[[str], int]
Cut = Callable[[str, int], str]


@dataclass
class Demonstrations:
    """Demonstrations, and why other questions have none: reasons with the number of questions."""

    rollouts: list[Rollout]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def questions(self) -> int:
        """Number of questions that have a demonstration."""
        return len({rollout.question.id for rollout in self.rollouts})


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes scripted demonstrations.

    Attributes:
        retriever: finds the documents.
        protocol: the language, and the limits of a turn and a passage.
        count_tokens: of a text.
        cut: shortens a text to so many tokens.
        wrong_turns: share of the demonstrations whose first search goes wrong.
        seed: of all that is drawn.
    """

    retriever: Retriever
    protocol: Protocol
    count_tokens: CountTokens
    cut: Cut
    wrong_turns: float
    seed: int

    def write(self, questions: Sequence[Question], count: int) -> Demonstrations:
        """Write up to so many demonstrations: one of each question, then others of the same in other words."""
        order = list(questions)
        Random(f"demonstrations {self.seed}").shuffle(order)
        found = Demonstrations([])
        with progress_bar("Demonstrations", count, hidden=False) as advance:
            for phrasing in range(PHRASINGS):
                able: list[Question] = []
                for question in order:
                    if len(found.rollouts) == count:
                        return found
                    try:
                        found.rollouts.append(self._demonstrate(question, phrasing))
                    except LeftOutError as error:
                        found.left_out[str(error)] += phrasing == 0
                        continue
                    able.append(question)
                    advance(1)
                order = able
        return found

    def _demonstrate(self, question: Question, phrasing: int) -> Rollout:
        """Write one demonstration, with shorter quotes where a message would be too long."""
        rng = Random(f"{self.seed} {question.id} {phrasing}")
        first_phrasing = Random(f"{self.seed} {question.id}").randrange(PHRASINGS)
        style = Style(
            opens_think=not self.protocol.opening,
            phrasing=first_phrasing + phrasing,
            wrong_turn=rng.random() < self.wrong_turns,
            max_searches=self.protocol.max_searches,
        )
        for words in _QUOTED_WORDS:
            script = search_script(question, replace(style, quoted_words=words), Random(rng.random()))
            rollout = play(script, question, self._search, self.protocol, sample=phrasing)
            messages = [segment.text for segment in rollout.policy_segments]
            if max(map(self.count_tokens, messages)) <= self.protocol.max_turn_tokens:
                return self._counted(rollout)
        raise LeftOutError("a message longer than max_turn_tokens")

    @property
    def _search(self) -> Search:
        def search(query: str) -> Sequence[Document]:
            [hits] = self.retriever.search([query], self.retriever.top_k)
            result = ToolResult(tuple(hit.document for hit in hits))
            limit = self.protocol.max_document_tokens
            return (result if limit is None else cut_documents(result, limit, self.cut)).documents or ()

        return search

    def _counted(self, rollout: Rollout) -> Rollout:
        segments = [replace(segment, num_tokens=self.count_tokens(segment.text)) for segment in rollout.segments]
        return replace(rollout, segments=tuple(segments), score=1.0, answer_score=1.0)
