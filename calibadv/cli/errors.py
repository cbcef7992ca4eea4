"""One line for a mistake: the innermost cause of a parser's error, and what would have been accepted."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.text import Text

import calibadv
from calibadv import interfaces

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"class_path '([^']+)'")
_SEAMS = {
    "engine": interfaces.Engine,
    "retriever": interfaces.Retriever,
    "reward": interfaces.Reward,
    "estimator": interfaces.AdvantageEstimator,
    "calibrators": interfaces.Calibrator,
    "loss": interfaces.PolicyLoss,
    "regularizers": interfaces.Regularizer,
}


def explain(message: str, options: Iterable[str] = ()) -> str:
    """Reduce a parser's error to its innermost cause.

    Args:
        message: of jsonargparse, up to some 70 lines.
        options: those that the parser accepts, for a suggestion.

    Returns:
        One line.
    """
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    if unknown:
        name = unknown[1].partition("=")[0]
        close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"option {name} is not accepted; {hint}--help lists the options, which cannot be abbreviated"
    key = ".".join(dict.fromkeys(_KEY.findall(message))) or "the command line"
    for pattern, describe in _CAUSES:
        found = re.search(pattern, message)
        if found:
            return f"{key}: {describe(found, message[: found.start()])}"
    return f"{key}: " + " ".join(line.strip() for line in _KEY.sub("", message).splitlines() if line.strip(" :"))


def _no_attribute(found: re.Match[str], before: str) -> str:
    module, name = found[1], found[2]
    return f"'{name}' is not in {module}; it has {_listed(getattr(import_module(module), '__all__', ()))}"


def _no_option(found: re.Match[str], before: str) -> str:
    class_path = _CLASS.findall(before)[-1] if _CLASS.search(before) else ""
    module, _, name = class_path.rpartition(".")
    accepted = inspect.signature(getattr(import_module(module), name)).parameters if module else ()
    return f"option '{found[1].rstrip('+')}' is not accepted by {name or 'this class'}; it takes {_listed(accepted)}"


def _no_class(found: re.Match[str], before: str) -> str:
    keys = _KEY.findall(before)
    seam = _SEAMS.get(keys[-1].rpartition(".")[2]) if keys else None
    known = f" ({_listed(_subclasses(seam))})" if seam else ""
    return f"no class is called '{found[1]}'; give a known name{known} or a dotted path such as package.module.Class"


def _not_a_choice(found: re.Match[str], before: str) -> str:
    return f"'{found[2]}' is not accepted; choose one of {found[1]}"


_CAUSES: list[tuple[str, Callable[[re.Match[str], str], str]]] = [
    (r"module '([\w.]+)' has no attribute '(\w+)'", _no_attribute),
    (r"Expected a dot import path string: (\S+)", _no_class),
    (r"Option '([^']+)' is not accepted", _no_option),
    (r"Expected a typing\.Literal\[([^\]]+)\]\. Got value: (.+)", _not_a_choice),
]


def _subclasses(seam: type) -> list[str]:
    classes: list[type] = seam.__subclasses__()
    found = [cls for cls in classes if cls.__module__.startswith("calibadv.")]
    return sorted(cls.__name__ for cls in found if not inspect.isabstract(cls))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by our own code, and so is a message for users, not a trace for developers.

    Args:
        error: as caught.

    Returns:
        True if the innermost frame lies in this package.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(calibadv.__file__).parent)


def report(message: str) -> None:
    """Print an error on the standard error stream, in one line.

    Args:
        message: what is wrong, the limit and the remedy.
    """
    line = Text.assemble(("calibadv: error: ", "bold red"), " ".join(message.split()))
    Console(stderr=True, soft_wrap=True).print(line, highlight=False)
