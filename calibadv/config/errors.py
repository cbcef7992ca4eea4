"""Reduction of the parser's errors, of up to 70 lines, to one line: the innermost cause and the accepted values."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterable
from importlib import import_module

from calibadv import interfaces
from calibadv.config.overlays import options_of
from calibadv.policy.precision import PRECISIONS

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"class_path '([^']+)'")
# --trainer.callbacks.NAME is tried on the last callback of the list, and then on a single one.
_LAST_CALLBACK = re.compile(
    r"""Parser key "trainer\.callbacks":.*?class_path '([\w.]+)':(.+?)\n    - .*NestedArg\(key='([\w.+]+)'""", re.DOTALL
)
_SEAMS = {
    "engine": interfaces.Engine,
    "protocol": interfaces.Protocol,
    "tools": interfaces.Tool,
    "retriever": interfaces.Retriever,
    "reward": interfaces.Reward,
    "estimator": interfaces.AdvantageEstimator,
    "calibrators": interfaces.Calibrator,
    "group_filter": interfaces.GroupFilter,
    "loss": interfaces.PolicyLoss,
    "regularizers": interfaces.Regularizer,
}
_TYPE_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}
_TYPE_NAMES |= {"NoneType": "null"}


def explain(message: str, options: Collection[str] = (), verb: str = "") -> str:
    """Reduce a parser's error to its innermost cause; ``options`` are those that the parser accepts."""
    if nested := _LAST_CALLBACK.search(message):
        return _option_of_last_callback(*nested.groups())
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        return _unknown_option(unknown[1].partition("=")[0], options)
    if in_file := re.search(r"does not accept option '([^']+)'", message):
        return _unknown_option(f"--{in_file[1].rstrip('+')}", options)
    keys = list(dict.fromkeys(_KEY.findall(message)))
    if missing := re.search(r"arguments are required: (.+)", message):
        names = [name.removeprefix(f"{verb}.") for name in missing[1].strip().split(", ")]
        return _missing_options([".".join([*keys, name]) for name in names], has_configs="--config" in options)
    if keys[-1:] == ["trainer.precision"]:
        return f"trainer.precision: give {PRECISIONS}"
    return (f"{'.'.join(keys)}: " if keys else "") + _cause(message)


def _cause(message: str) -> str:
    for pattern, describe in _CAUSES:
        if found := re.search(pattern, message):
            if isinstance(describe, str):
                return describe.format(found[0], *found.groups())
            return describe(found, message[: found.start()])
    return " ".join(line.strip() for line in _KEY.sub("", message).splitlines() if line.strip(" :"))


def _option_of_last_callback(class_path: str, cause: str, option: str) -> str:
    name = class_path.rpartition(".")[2]
    if name == "Callback":
        return (
            f"--trainer.callbacks.{option} sets an option of the last callback, and there is none; put the overlay of "
            "one before it, such as --config callbacks/collapse_guard"
        )
    if option.partition(".")[0].rstrip("+") in options_of(class_path):
        return f"trainer.callbacks.{explain(cause)}"
    return (
        f"--trainer.callbacks.{option} sets an option of the last callback, which is {name} and takes "
        f"{_listed(options_of(class_path))}; put the overlay of the intended callback last, or set it in a config file"
    )


def _unknown_option(name: str, options: Collection[str]) -> str:
    if not name.startswith("-"):
        return f"'{name}' belongs to no option; a config needs --config before it"
    close = sorted((option for option in options if option.startswith(name)), key=len)
    close = close or difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"option {name} is not accepted; {hint}--help lists the options, which cannot be abbreviated"


def _missing_options(names: list[str], has_configs: bool) -> str:
    given = " and ".join(f"--{name} VALUE" for name in names)
    remedy = f"; give {'it' if len(names) == 1 else 'them'}, or a --config that does" if has_configs else ""
    return f"{given} {'is' if len(names) == 1 else 'are'} missing{remedy}"


def _no_attribute(found: re.Match[str], before: str) -> str:
    module, name = found[1], found[2]
    return f"'{name}' is not in {module}; it has {_listed(getattr(import_module(module), '__all__', ()))}"


def _no_option(found: re.Match[str], before: str) -> str:
    class_path = _CLASS.findall(before)[-1] if _CLASS.search(before) else ""
    name, accepted = class_path.rpartition(".")[2], options_of(class_path) if class_path else ()
    return f"option '{found[1].rstrip('+')}' is not accepted by {name or 'this class'}; it takes {_listed(accepted)}"


def _no_class(found: re.Match[str], before: str) -> str:
    keys = _KEY.findall(before)
    seam = _SEAMS.get(keys[-1].rpartition(".")[2]) if keys else None
    known = f" ({_listed(_subclasses(seam))})" if seam else ""
    return f"no class is called '{found[1]}'; give a known name{known} or a dotted path such as package.module.Class"


def _not_a_type(found: re.Match[str], before: str) -> str:
    return f"'{found[2]}' is not accepted; it must be {_TYPE_NAMES.get(found[1], found[1])}"


def _no_command(found: re.Match[str], before: str) -> str:
    return f"the command is missing; choose {' or '.join(found[1].split(','))}"


def _none_of_types(found: re.Match[str], before: str) -> str:
    expected = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.+)\])", found[1])
    accepted = [_TYPE_NAMES.get(kind, kind) if kind else choices.replace(", ", " or ") for kind, choices in expected]
    return f"'{found[2]}' is not accepted; it must be {' or '.join(accepted)}"


# Patterns of causes, each with its description: a template of the pattern's groups, or a function.
_CAUSES: list[tuple[str, str | Callable[[re.Match[str], str], str]]] = [
    (r"module '([\w.]+)' has no attribute '(\w+)'", _no_attribute),
    (
        r"class_path '([\w.]+)':\s+(No module named '[\w.]+')",
        "'{1}' cannot be imported ({2}); install it, or correct the path package.module.Class",
    ),
    (r"Expected a dot import path string: (\S+)", _no_class),
    (r"Option '([^']+)' is not accepted", _no_option),
    (r"Expected a typing\.Literal\[([^\]]+)\]\. Got value: (.+)", "'{2}' is not accepted; choose one of {1}"),
    (r"Expected a <class '(\w+)'>\. Got value: (.+)", _not_a_type),
    (r'Linked "([^"]+)" must be given via "([^"]+)"', "{1} is set by --{2} only; give that"),
    (r'expected "subcommand" to be one of \{(.+)\}', _no_command),
    (r"subcommand: invalid choice: '(.+)' \(choose from (.+)\)", "there is no command '{1}'; choose one of {2}"),
    (
        r"argument (--[\w.+]+)(?:(?:, |/)--[\w.+]+)*: expected (?:one|at least one) argument",
        "{1} has no value; give it one",
    ),
    (r"Errors:\s+((?:- Expected a [^\n]+\s+){2,})Given value type: [^\n]+\s+Given value: ([^\n]+)", _none_of_types),
]


def _subclasses(seam: type) -> list[str]:
    classes: list[type] = seam.__subclasses__()
    found = [cls for cls in classes if cls.__module__.startswith("calibadv.")]
    return sorted(cls.__name__ for cls in found if not inspect.isabstract(cls))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
