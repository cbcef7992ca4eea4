"""The commands beside the four verbs: typed functions, whose signatures and docstrings are their options and help."""

from __future__ import annotations

import json
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings
from rich.console import Console

from calibadv.config.errors import explain
from calibadv.config.files import ConfigFile, read_words
from calibadv.config.help import TOOLS, ToolHelp, describe_tool
from calibadv.errors import UserError

Functions = dict[str, Callable[..., Any]]


def run_tool(command: str, arguments: Sequence[str]) -> int:
    """Run one tool command."""
    functions = tool_functions(command)
    parser = tool_parser(command)
    try:
        parsed = parser.instantiate(parser.parse_args(_joined_lists(arguments, functions)))
    except ArgumentError as error:
        verb = next((word for word in arguments if word in functions), "")
        # To a tool null says no more than leaving the option out.
        raise UserError(explain(str(error), _options(parser), verb).removesuffix(" or null")) from error
    chosen = parsed.pop("subcommand", None)
    options = (parsed[chosen] if chosen else parsed).as_dict()
    function = functions[chosen or command]
    if options.get("out") is not None:
        _run_and_report(function, options)
    else:
        function(**options)
    return 0


def _run_and_report(function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Run a function that writes to ``out``, and say so."""
    out = options["out"]
    try:
        function(**options)
    except OSError as error:
        raise UserError(f"out '{out}' cannot be written ({error.strerror or error}); give another --out") from error
    if not options.get("json"):  # what is printed then is for a program to read
        Console(soft_wrap=True).print(f"wrote {out}", highlight=False, markup=False)


def tool_parser(command: str) -> ArgumentParser:
    """Build the parser of a tool command."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    functions = tool_functions(command)
    if command in functions:
        parser = _function_parser(f"calibadv {command}", TOOLS[command], functions[command])
        first = _first_parameter(functions[command])
        action = next(action for action in parser._actions if action.dest == first)
        action.help = f"{action.help} May stand first, without --{first}."
        usage = parser.format_usage().removeprefix("usage: ").rstrip("\n")
        parser.usage = usage.replace(f"--{first} ", "", 1)
        return parser
    parser = _new_parser(f"calibadv {command}", TOOLS[command])
    subcommands = parser.add_subcommands(title="what to do", help="One of these:")
    for name, function in functions.items():
        summary = (function.__doc__ or "").partition("\n")[0]
        own = _function_parser(f"calibadv {command} {name}", summary, function)
        subcommands.add_subcommand(name, own, help=summary)
    return parser


def _function_parser(prog: str, description: str, function: Callable[..., Any]) -> ArgumentParser:
    flags = [name for name, kind in get_type_hints(function).items() if kind is bool]
    typed = _new_parser(prog, description)
    typed.add_function_arguments(function, as_group=False)
    parser = _new_parser(prog, description)
    parser.add_function_arguments(function, as_group=False, skip=set(flags))
    for flag in flags:  # by its type it would want the word true behind it
        text = next(action.help for action in typed._actions if action.dest == flag)
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    _drop_dataclasses(parser)
    describe_tool(parser)
    return parser


def _drop_dataclasses(parser: ArgumentParser) -> None:
    """Remove the option for the whole of a dataclass, which wants a file: each of its fields has one of its own."""
    names = {action.dest for action in parser._actions}
    for group in parser._action_groups:
        for action in list(group._group_actions):
            if any(name.startswith(f"{action.dest}.") for name in names):
                group._remove_action(action)
                for option in action.option_strings:
                    del parser._option_string_actions[option]


def _new_parser(prog: str, description: str) -> ArgumentParser:
    return ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False, formatter_class=ToolHelp
    )


def tool_functions(command: str) -> Functions:
    """The functions behind a tool command. One that writes something has a parameter ``out``: where."""
    if command == "replay":
        from calibadv.analysis.replay import replay

        return {"replay": replay}
    if command == "compare":
        from calibadv.analysis.compare.command import compare

        return {"compare": compare}
    if command == "view":
        from calibadv.analysis.viewer.command import view

        return {"view": view}
    if command == "world":
        from calibadv.world import command as world

        return {"export": world.export, "policy": world.policy}
    if command == "index":
        from calibadv.retrieval.index.build import index

        return {"index": index}
    from calibadv.cli import retrieval

    return {command: getattr(retrieval, command)}


def _joined_lists(arguments: Sequence[str], functions: Functions) -> list[str]:
    """``--config a --config b``, ``--config a b`` and ``--top_k 2 5`` become one option each, which holds a list."""
    if arguments and not arguments[0].startswith("-") and len(functions) == 1:
        # What stands before the first option is its first parameter: view FILE ..., compare RUN ...
        (function,) = functions.values()
        arguments = [f"--{_first_parameter(function)}", *arguments]
    kinds = {f"--{name}": kind for function in functions.values() for name, kind in get_type_hints(function).items()}
    names: list[str] = []
    words: list[str] = []
    lists: dict[str, list[str]] = {}
    for setting in read_words(arguments):
        if isinstance(setting, ConfigFile):
            names.append(str(setting.path))
            continue
        name, equals, value = setting.words[0].partition("=")
        if "list[" in str(kinds.get(name)):
            lists.setdefault(name, []).extend([value] if equals else setting.words[1:])
        else:
            words += setting.words
    for name, values in lists.items():
        words += _joined(name, values, kinds[name])
    return [*words, "--config", json.dumps(names)] if names else words


def _first_parameter(function: Callable[..., Any]) -> str:
    return next(iter(get_type_hints(function)))


def _joined(name: str, values: Sequence[str], kind: Any) -> list[str]:
    # One word is a list only where nothing else is accepted, and a list that is typed as JSON is one already.
    several = len(values) > 1 or (_is_list(kind) and len(values) == 1)
    return [name, json.dumps(values)] if several and not values[0].startswith("[") else [name, *values]


def _is_list(kind: Any) -> bool:
    """Whether a word can only be an element: of a list, or of one that may be left out."""
    accepted = set(get_args(kind)) - {NoneType} if get_origin(kind) is UnionType else {kind}
    return all(get_origin(one) is list for one in accepted)


def _options(parser: ArgumentParser) -> list[str]:
    own = [option for action in parser._actions for option in action.option_strings if option != "--config"]
    below = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    return own + [option for choices in below for sub in choices.values() for option in _options(sub)]
