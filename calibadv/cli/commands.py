"""Typed commands: functions whose signatures and docstrings are the options and help of a command."""

from __future__ import annotations

import json
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings
from rich.console import Console

from calibadv.cli.command_table import COMMANDS
from calibadv.config.errors import explain
from calibadv.config.files import ConfigFile, Option, read_words
from calibadv.config.help import CommandHelpFormatter, set_metavars
from calibadv.config.logging import quiet_libraries
from calibadv.errors import UserError

Functions = dict[str, Callable[..., Any]]
_new_parser = partial(ArgumentParser, exit_on_error=False, allow_abbrev=False, formatter_class=CommandHelpFormatter)


def run_command(command: str, arguments: Sequence[str]) -> int:
    """Run one command, and return its exit status."""
    functions = _functions(command)
    if COMMANDS[command].loads_model:
        quiet_libraries()
    parser = command_parser(command)
    try:
        parsed = parser.instantiate(parser.parse_args(_joined_lists(arguments, functions)))
    except ArgumentError as error:
        verb = next((word for word in arguments if word in functions), "")
        # In a typed command, null means the same as leaving the option out.
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
    """Run a function that writes to ``out``, and print the path."""
    out = options["out"]
    try:
        function(**options)
    except OSError as error:
        raise UserError(f"out '{out}' cannot be written ({error.strerror or error}); give another --out") from error
    if not options.get("json"):  # the output is then for programs
        Console(soft_wrap=True).print(f"wrote {out}", highlight=False, markup=False)


def command_parser(command: str) -> ArgumentParser:
    """Build the parser of a command."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    functions, summary = _functions(command), COMMANDS[command].summary
    if command in functions:
        parser = _function_parser(f"calibadv {command}", summary, functions[command])
        first = _first_parameter(functions[command])
        action = next(action for action in parser._actions if action.dest == first)
        action.help = f"{action.help} May stand first, without --{first}."
        usage = parser.format_usage().removeprefix("usage: ").rstrip("\n")
        parser.usage = usage.replace(f"--{first} ", "", 1)
        return parser
    parser = _new_parser(prog=f"calibadv {command}", description=summary)
    subcommands = parser.add_subcommands(title="what to do", help="One of these:")
    for name, function in functions.items():
        text = (function.__doc__ or "").partition("\n")[0]
        own = _function_parser(f"calibadv {command} {name}", text, function)
        subcommands.add_subcommand(name, own, help=text)
    return parser


def _function_parser(prog: str, description: str, function: Callable[..., Any]) -> ArgumentParser:
    flags = [name for name, kind in get_type_hints(function).items() if kind is bool]
    typed = _new_parser(prog=prog, description=description)
    typed.add_function_arguments(function, as_group=False)
    parser = _new_parser(prog=prog, description=description)
    parser.add_function_arguments(function, as_group=False, skip=set(flags))
    for flag in flags:  # by its type, it would need the value true
        text = next(action.help for action in typed._actions if action.dest == flag)
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    _drop_dataclasses(parser)
    _rename_keywords(parser)
    set_metavars(parser)
    return parser


def _rename_keywords(parser: ArgumentParser) -> None:
    """Give parameters such as ``from_``, whose name would be a keyword of Python, an option without the underscore."""
    for action in parser._actions:
        if action.dest.endswith("_"):
            del parser._option_string_actions[f"--{action.dest}"]
            action.option_strings = [f"--{action.dest.rstrip('_')}"]
            parser._option_string_actions[action.option_strings[0]] = action


def _drop_dataclasses(parser: ArgumentParser) -> None:
    """Remove the options of whole dataclasses, which take a file; each field has an option of its own."""
    names = {action.dest for action in parser._actions}
    for group in parser._action_groups:
        for action in list(group._group_actions):
            if any(name.startswith(f"{action.dest}.") for name in names):
                group._remove_action(action)
                for option in action.option_strings:
                    del parser._option_string_actions[option]


def _functions(command: str) -> Functions:
    """Import the functions of a command. One that writes files has a parameter ``out``."""
    functions = [resolve_name(path) for path in COMMANDS[command].functions]
    return {function.__name__: function for function in functions}


def _joined_lists(arguments: Sequence[str], functions: Functions) -> list[str]:
    """Join the values of each list option, such as ``--config a --config b`` or ``--top_k 2 5``, into one JSON list."""
    kinds = {f"--{name}": kind for function in functions.values() for name, kind in get_type_hints(function).items()}
    settings = read_words(_with_first_option(arguments, functions))
    options = [setting for setting in settings if isinstance(setting, Option)]
    if len(functions) == 1:
        options[-1:] = _without_trailing(options[-1:], kinds, _first_parameter(next(iter(functions.values()))))
    words = _joined_options(options, kinds)
    configs = [str(setting.path) for setting in settings if isinstance(setting, ConfigFile)]
    return [*words, "--config", json.dumps(configs)] if configs else words


def _with_first_option(arguments: Sequence[str], functions: Functions) -> list[str]:
    """Put ``--NAME`` before leading words, which are values of the first parameter: view FILE ..., compare RUN ..."""
    if arguments and not arguments[0].startswith("-") and len(functions) == 1:
        (function,) = functions.values()
        return [f"--{_first_parameter(function)}", *arguments]
    return list(arguments)


def _without_trailing(options: list[Option], kinds: Mapping[str, Any], first: str) -> list[Option]:
    """Take a word behind the last option as the value of the first parameter: ask --model DIR "Who ...?"."""
    for last in options:
        kind = kinds.get(last.name)
        taken = 1 if kind is bool else 2
        if kind is not None and "list[" not in str(kind) and len(last.words) == taken + 1:
            return [Option(last.name, last.words[:taken], {}), Option(f"--{first}", (f"--{first}", last.words[-1]), {})]
    return options


def _joined_options(options: Sequence[Option], kinds: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    lists: dict[str, list[str]] = {}
    for option in options:
        name, equals, value = option.words[0].partition("=")
        if "list[" in str(kinds.get(name)):
            lists.setdefault(name, []).extend([value] if equals else option.words[1:])
        else:
            words += option.words
    return words + [word for name, values in lists.items() for word in _joined(name, values, kinds[name])]


def _first_parameter(function: Callable[..., Any]) -> str:
    return next(iter(get_type_hints(function)))


def _joined(name: str, values: Sequence[str], kind: Any) -> list[str]:
    # A single word is a list only if nothing else is accepted; a list in JSON stays as it is.
    several = len(values) > 1 or (_is_list(kind) and len(values) == 1)
    return [name, json.dumps(values)] if several and not values[0].startswith("[") else [name, *values]


def _is_list(kind: Any) -> bool:
    """Return True for a list, or a list or None."""
    accepted = set(get_args(kind)) - {NoneType} if get_origin(kind) is UnionType else {kind}
    return all(get_origin(one) is list for one in accepted)


def _options(parser: ArgumentParser) -> list[str]:
    own = [option for action in parser._actions for option in action.option_strings if option != "--config"]
    below = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    return own + [option for choices in below for sub in choices.values() for option in _options(sub)]
