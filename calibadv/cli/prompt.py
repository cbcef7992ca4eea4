"""The command ``prompt``: what a model is given for a question."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from calibadv.agent.tools import SearchTool
from calibadv.config.files import read_words
from calibadv.config.lightning_cli import ReadingCLI
from calibadv.config.logging import quiet_libraries
from calibadv.data.datamodule import load_questions
from calibadv.errors import UserError
from calibadv.policy.loading import load_tokenizer
from calibadv.protocol.reading import read_protocol
from calibadv.retrieval import MemoryRetriever
from calibadv.types import Question


def prompt(arguments: Sequence[str]) -> int:
    """Print the prompt of the first question, as the settings of a run make it; returns the exit status."""
    quiet_libraries()
    settings = ReadingCLI(read_words(arguments)).settings_of_fit
    question = _first_question(settings.data)
    protocol = read_protocol(settings.model.protocol)
    tokenizer = load_tokenizer(settings.model.policy, protocol.tags, protocol.stop_strings)
    tools = [SearchTool(MemoryRetriever())]  # only described in the prompt, if at all
    token_ids = protocol.prompt_ids(question.question, tokenizer, tools)
    text = str(tokenizer.backend.decode(token_ids))
    before = text.removesuffix(protocol.opening)
    console = Console(soft_wrap=True)
    console.print(Text(f"question {question.id} of {question.data_source}\n", style="dim"))
    console.print(Text.assemble(before, (protocol.opening, "bold green"), ("   <- the policy writes from here", "dim")))
    room = protocol.max_rollout_tokens - len(token_ids)
    console.print(
        f"\n{len(token_ids)} tokens, all written by the environment"
        f"{f', {protocol.opening} included' if protocol.opening else ''}; {room} of protocol.max_rollout_tokens "
        f"({protocol.max_rollout_tokens}) are left for messages, of {protocol.max_turn_tokens} at most, and for what "
        "searches find",
        highlight=False,
    )
    return 0


def _first_question(data: object) -> Question:
    """The first question of the first split that is given."""
    for split in ("train", "validation", "test"):
        found = load_questions(getattr(data, split), split)
        if found:
            return found[0]
    raise UserError("there is no question to show the prompt of; give --data.train, a question file or 'embedded'")
