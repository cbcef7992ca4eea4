"""The commands beside the four verbs: typed functions, whose signatures and docstrings are their options and help."""

from __future__ import annotations

import json
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from calibadv.cli.configs import ConfigFile, read_words
from calibadv.cli.explain import explain
from calibadv.cli.help import TOOLS

Functions = dict[str, Callable[..., Any]]


def run_tool(command: str, arguments: Sequence[str]) -> int:
    """Run one tool command.

    Args:
        command: ``replay`` or ``world``.
        arguments: the words behind it.

    Returns:
        The exit status.

    Raises:
        ValueError: a mistake in the arguments, in what they name, or in where to write.
    """
    functions = tool_functions(command)
    parser = tool_parser(command)
    try:
        parsed = parser.instantiate(parser.parse_args(_one_config_option(arguments)))
    except ArgumentError as error:
        verb = next((word for word in arguments if word in functions), "")
        raise ValueError(explain(str(error), _options(parser), verb)) from error
    chosen = parsed.pop("subcommand", None)
    options = parsed[chosen] if chosen else parsed
    try:
        functions[chosen or command](**options.as_dict())
    except OSError as error:
        raise ValueError(f"out '{options.out}' cannot be written ({error.strerror}); give another --out") from error
    Console(soft_wrap=True).print(f"wrote {options.out}", highlight=False, markup=False)
    return 0


def tool_parser(command: str) -> ArgumentParser:
    """Build the parser of a tool command.

    Args:
        command: ``replay`` or ``world``.

    Returns:
        A parser, with a subcommand for each function where there are several.
    """
    functions = tool_functions(command)
    parser = _new_parser(f"calibadv {command}", TOOLS[command])
    if command in functions:
        parser.add_function_arguments(functions[command], as_group=False)
        return parser
    subcommands = parser.add_subcommands(title="what to do", help="One of these:")
    for name, function in functions.items():
        summary = (function.__doc__ or "").partition("\n")[0]
        own = _new_parser(f"calibadv {command} {name}", summary)
        own.add_function_arguments(function, as_group=False)
        subcommands.add_subcommand(name, own, help=summary)
    return parser


def _new_parser(prog: str, description: str) -> ArgumentParser:
    return ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)


def tool_functions(command: str) -> Functions:
    """The functions behind a tool command; each has a parameter ``out``, which is what it writes.

    Args:
        command: ``replay`` or ``world``.

    Returns:
        Functions by the name of the subcommand, or of the command itself.
    """
    if command == "replay":
        from calibadv.replay import replay

        return {"replay": replay}
    from calibadv.world import command as world

    return {"export": world.export, "policy": world.policy}


def _one_config_option(arguments: Sequence[str]) -> list[str]:
    """``--config a --config b`` and ``--config a b`` become one option, which holds a list."""
    settings = read_words(arguments)
    names = [str(setting.path) for setting in settings if isinstance(setting, ConfigFile)]
    words = [word for setting in settings if not isinstance(setting, ConfigFile) for word in setting.words]
    return [*words, "--config", json.dumps(names)] if names else words


def _options(parser: ArgumentParser) -> list[str]:
    own = [option for action in parser._actions for option in action.option_strings if option != "--config"]
    below = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    return own + [option for choices in below for sub in choices.values() for option in _options(sub)]
