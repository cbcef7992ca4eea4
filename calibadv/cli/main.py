"""The entry point: ``calibadv COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

from calibadv.config.help import PLAN, STUDY, TOOLS, VERBS
from calibadv.config.logging import quiet_environment
from calibadv.config.threads import sleep_while_waiting
from calibadv.config.user_errors import report, run_reporting
from calibadv.runs.versions import versions

_COMMANDS = {**VERBS, **STUDY, **PLAN, **TOOLS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        _print_help()
        return 0
    if command == "--version":
        _print_versions()
        return 0
    if command not in _COMMANDS:
        report(f"there is no command '{command}'; choose one of {', '.join(_COMMANDS)}")
        return 2
    quiet_environment()
    sleep_while_waiting()
    return run_reporting(partial(_run, command, rest))


def _run(command: str, arguments: Sequence[str]) -> int:
    # Imported here, once the environment is set: each of these takes torch or another large library along.
    if command in VERBS:
        from calibadv.config.verbs import run_verb

        return run_verb(command, arguments)
    if command in STUDY:
        from calibadv.study import study

        return study(arguments)
    if command in PLAN:
        from calibadv.planning.command import plan

        return plan(arguments)
    from calibadv.cli.commands import run_tool

    return run_tool(command, arguments)


def _print_versions() -> None:
    others = versions()
    own = others.pop("calibadv")
    made_with = ", ".join(f"{name} {number}" for name, number in others.items())
    Console(soft_wrap=True).print(f"calibadv {own} ({made_with})", highlight=False)


def _print_help() -> None:
    console = Console()
    console.print("[bold]usage:[/bold] calibadv COMMAND [--config NAME_OR_FILE ...] [--option VALUE ...]\n")
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in _COMMANDS.items():
        table.add_row(f"  [bold]{name}[/bold]", text)
    console.print(table)
    console.print(
        "\n'calibadv COMMAND --help' lists the options of a command. For a first run: calibadv fit --config quickstart"
        "\n'calibadv --version' says what is installed."
    )


if __name__ == "__main__":
    sys.exit(main())
