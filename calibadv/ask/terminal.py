"""The agent on the terminal: its steps as they come."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from calibadv.ask.session import Event, Session

_INDENT = "  "
_SHOWN = 300  # characters of a passage


def show(events: Iterable[Event], console: Console) -> None:
    """Print the events of one question."""
    thinking = False
    for event in events:
        if event.kind == "think":
            if not thinking and not event.text.strip():
                continue
            text = event.text if thinking else event.text.lstrip()
            console.print(Text(("" if thinking else "think   ") + text, style="dim"), end="", soft_wrap=True)
            thinking = True
            continue
        if thinking:
            console.print()
            thinking = False
        _show(event, console)


def _show(event: Event, console: Console) -> None:
    if event.kind == "search":
        console.print(Text.assemble(("search  ", "cyan"), (event.text, "bold cyan")))
    elif event.kind == "documents":
        for document in event.content:
            text = " ".join(document["text"].split())
            cut = text if len(text) <= _SHOWN else text[:_SHOWN].rsplit(" ", 1)[0] + " ..."
            console.print(Text.assemble((f"{_INDENT}{document['title'] or document['id']}  ", "bold"), (cut, "dim")))
        if not event.content:
            console.print(Text(f"{_INDENT}nothing found", style="dim"))
    elif event.kind == "answer":
        console.print(Text.assemble(("answer  ", "green"), (event.text, "bold green")))
    elif event.text != "answered":
        console.print(Text(f"{_reason(event.text)}", style="yellow"))


def _reason(status: str) -> str:
    return {
        "truncated": "no answer: a message, or the rollout, became too long",
        "invalid": "not a valid rollout: a message does not keep the format",
        "out_of_turns": "no answer: the agent went on searching",
    }.get(status, status)


def converse(session: Session, console: Console) -> None:
    """Ask for questions and answer them, until the input ends. Arrow keys bring earlier questions back."""
    import readline  # noqa: F401  # gives input() its history

    console.print("Ask a question; an empty line or Ctrl-D ends.", style="dim")
    while True:
        try:
            question = input("? ").strip()
        except EOFError:
            console.print()
            return
        if not question:
            return
        try:
            show(session.ask(question), console)
        except KeyboardInterrupt:
            console.print("\ninterrupted", style="dim")
