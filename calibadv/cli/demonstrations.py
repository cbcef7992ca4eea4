"""The command ``demonstrate``: demonstrations for a warm start."""

from __future__ import annotations

import re
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from calibadv.cli.retrieval import open_retriever
from calibadv.data.questions import read_questions
from calibadv.demonstrations.selection import read_all, rollout_files, select
from calibadv.demonstrations.writing import CountTokens, Cut, Demonstrations, Writer
from calibadv.errors import UserError
from calibadv.policy.loading import load_tokenizer
from calibadv.policy.tokenizer import CUT_MARK
from calibadv.protocol import SearchProtocol
from calibadv.retrieval.checks import check_at_least
from calibadv.runs.rollouts import write_rollouts


def demonstrate(  # noqa: PLR0913  # its parameters are the options of the command
    out: Path,
    questions: list[str] | None = None,
    index: Path | None = None,
    retriever: str | None = None,
    from_: Path | None = None,
    count: int = 1000,
    top_k: int = 2,
    max_document_tokens: int = 80,
    max_searches: int = 3,
    max_turn_tokens: int = 64,
    opens_think: bool = False,
    policy: str | None = None,
    wrong_turns: float = 0.0,
    min_score: float = 0.8,
    seed: int = 0,
) -> None:
    """Write demonstrations for 'calibadv sft': those of a script, or rollouts that scored well.

    Args:
        out: Rollout file to write.
        questions: Question files whose metadata name supporting_titles; a script demonstrates how to find them.
        index: Folder that 'calibadv index' wrote.
        retriever: In the place of an index: a YAML file as for fit, or a packaged config such as retrievers/hybrid.
        from_: In the place of questions: a run folder or a rollout file, of which to keep the best.
        count: The most demonstrations; where questions are fewer, some have several, in other words.
        top_k: Documents per search.
        max_document_tokens: Passages are cut to so many tokens.
        max_searches: Questions that need more searches are left out.
        max_turn_tokens: The most tokens of a message.
        opens_think: The policy writes <think> itself, as with the config protocols/no_prepend.
        policy: Folder of the policy, whose tokenizer counts the tokens of messages and passages; by default words and
            punctuation marks are counted.
        wrong_turns: Share of the demonstrations whose first search goes wrong and is corrected.
        min_score: With --from, the least score of a rollout that is kept.
        seed: Of the order of the questions and of their wordings.

    Raises:
        UserError: nothing or too much is given to demonstrate from, or no demonstration is left.
    """
    check_at_least(1, count=count, top_k=top_k)
    for name, share in (("wrong_turns", wrong_turns), ("min_score", min_score)):
        if not 0 <= share <= 1:
            raise UserError(f"{name} is {share}; it must be from 0 to 1")
    if (questions is None) == (from_ is None):
        raise UserError("give either --questions and --index, or --from RUN_OR_FILE")
    if from_ is not None:
        found = select(read_all(rollout_files(from_)), min_score, count)
    else:
        asked = read_questions(list(questions or []))
        searched = open_retriever(index, retriever)
        searched.top_k = top_k
        protocol = SearchProtocol(
            prepend_think=not opens_think,
            max_searches=max_searches,
            max_turn_tokens=max_turn_tokens,
            max_document_tokens=max_document_tokens,
        )
        count_tokens, cut = _counters(policy, protocol)
        found = Writer(searched, protocol, count_tokens, cut, wrong_turns, seed).write(asked, count)
    if found.left_out:
        Console().print(_table(found))
    if not found.rollouts:
        raise UserError("no demonstration is left, see the reasons above; give other questions or other limits")
    write_rollouts(out, found.rollouts)
    Console(soft_wrap=True).print(
        f"{len(found.rollouts)} demonstrations of {found.questions} questions", highlight=False
    )


def _counters(policy: str | None, protocol: SearchProtocol) -> tuple[CountTokens, Cut]:
    """Return the functions that count tokens and cut texts."""
    if policy is None:
        return _count_words, _cut_words
    tokenizer = load_tokenizer(policy, protocol.tags, protocol.stop_strings)
    return lambda text: len(tokenizer.encode(text)), tokenizer.cut


def _count_words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def _cut_words(text: str, most: int) -> str:
    words = list(re.finditer(r"\w+|[^\w\s]", text))
    return text if len(words) <= most else text[: words[most - 1].end()] + CUT_MARK


def _table(found: Demonstrations) -> Table:
    table = Table("left out, for", "count", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[1].justify = "right"
    for reason, number in found.left_out.most_common():
        table.add_row(reason, str(number))
    return table
