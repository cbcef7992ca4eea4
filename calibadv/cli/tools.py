"""The commands beside the four verbs: typed functions, whose signatures and docstrings are their options and help."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

from jsonargparse import auto_cli

from calibadv.cli.errors import explain, report


def run_tool(command: str, arguments: Sequence[str]) -> int:
    """Run one tool command.

    Args:
        command: ``replay`` or ``world``.
        arguments: the words behind it.

    Returns:
        The exit status.
    """
    try:
        auto_cli(
            _component(command),
            args=list(arguments),
            prog=f"calibadv {command}",
            exit_on_error=False,
            as_positional=False,
            allow_abbrev=False,
        )
    except ArgumentError as error:
        report(explain(str(error)))
        return 2
    return 0


def _component(command: str) -> Any:
    if command == "replay":
        from calibadv.replay import replay

        return replay
    from calibadv.world import command as world

    return {
        "_help": "Export the embedded world, or make its policy again from nothing.",
        "export": world.export,
        "policy": world.policy,
    }
