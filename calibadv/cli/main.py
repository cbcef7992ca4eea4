"""Entry point: ``calibadv COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pkgutil import resolve_name

from rich.console import Console
from rich.table import Table

from calibadv.cli.command_table import COMMANDS
from calibadv.config.logging import quiet_environment
from calibadv.config.threads import sleep_while_waiting
from calibadv.config.user_errors import print_error, run_reporting
from calibadv.runs.versions import versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        _print_help()
        return 0
    if command == "--version":
        _print_versions()
        return 0
    if command not in COMMANDS:
        print_error(f"there is no command '{command}'; choose one of {', '.join(COMMANDS)}")
        return 2
    quiet_environment()
    sleep_while_waiting()
    return run_reporting(partial(_run, command, rest))


def _run(name: str, words: Sequence[str]) -> int:
    """Run a command; what it needs, torch included, is imported only now."""
    command = COMMANDS[name]
    if command.entry:
        status: int | None = resolve_name(command.entry)(*command.leading, words)
        return status or 0
    from calibadv.cli.commands import run_command

    return run_command(name, words)


def _print_versions() -> None:
    others = versions()
    own = others.pop("calibadv")
    listed = ", ".join(f"{name} {number}" for name, number in others.items())
    Console(soft_wrap=True).print(f"calibadv {own} ({listed})", highlight=False)


def _print_help() -> None:
    console = Console()
    console.print("[bold]usage:[/bold] calibadv COMMAND [--config NAME_OR_FILE ...] [--option VALUE ...]\n")
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, command in COMMANDS.items():
        table.add_row(f"  [bold]{name}[/bold]", command.summary)
    console.print(table)
    console.print(
        "\n'calibadv COMMAND --help' lists the options of a command. For a first run: calibadv fit --config quickstart"
        "\n'calibadv --version' lists the installed versions."
    )


if __name__ == "__main__":
    sys.exit(main())
