"""Measure how readable the package is: one Markdown table, which docs/contributing.md shows.

    python tools/measure.py [FOLDER]

FOLDER holds the package ``calibadv``; by default it is this repository. Lines are those of the files. Code lines are
lines that hold a token of code: neither blank, comment nor docstring.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from radon.complexity import cc_visit
from radon.visitors import Function

PACKAGE = "calibadv"
# From the command to the gradient, in the order of the calls: every function names the next one.
CALL_PATH = (
    ("cli/main.py", "main"),
    ("config/verbs.py", "run_verb"),
    ("config/lightning_cli.py", "_run_subcommand"),
    ("module.py", "training_step"),
    ("training/logprobs.py", "loss_inputs"),
    ("policy/logprobs.py", "forward_logprobs"),
    ("training/objective.py", "compute"),
    ("losses/ppo_clip.py", "compute"),
)
RIDDLES = ("What", "How", "Whether", "Where", "Which", "Why")
_CODELESS = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> None:
    """Print the table."""
    package = (Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent.parent) / PACKAGE
    sources = {path.relative_to(package): path.read_text() for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in sources.items()}
    lines = {path: len(text.splitlines()) for path, text in sources.items()}
    docstrings = [node for tree in trees.values() for node in _docstrings(tree)]
    docstring_lines = sum(_span(node) for node in docstrings)
    code_lines = sum(_code_lines(sources[path], trees[path]) for path in sources)
    functions = [(path, node) for path, tree in trees.items() for node in _functions(tree)]
    folders = Counter(path.parent for path in sources if path.name != "__init__.py")
    complex_functions = [block.name for text in sources.values() for block in _blocks(text) if block.complexity > 10]
    circles = list(_circles(trees))
    rows: list[tuple[str, object]] = [
        ("files on the call path from `main` to the gradient", len({file for file, _ in CALL_PATH})),
        ("lines of these files", sum(lines.get(Path(file), 0) for file, _ in CALL_PATH)),
        ("files at the top of the package", folders[Path()] + 1),
        ("folders with more than 12 modules", _names(str(f) for f, n in folders.items() if n > 12)),
        ("modules over 300 lines", _names(f"{p} {n}" for p, n in lines.items() if n > 300)),
        ("functions over 50 lines", _names(f"{p}:{f.name} {_span(f)}" for p, f in functions if _span(f) > 50)),
        ("functions with a cyclomatic complexity over 10", _names(complex_functions)),
        ("docstring lines per 100 lines of code", round(100 * docstring_lines / code_lines)),
        (
            "docstrings that open with What, How, Whether, Where, Which or Why",
            sum(_text(node).split()[0] in RIDDLES for node in docstrings),
        ),
        ("import circles, imports for types and in functions included", _names(circles)),
        ("Python files", len(sources)),
        ("lines", sum(lines.values())),
    ]
    print("| measure | value |\n| --- | --- |")
    print("\n".join(f"| {name} | {value} |" for name, value in rows))


def _names(found: Iterator[str] | list[str]) -> str:
    """The number of things, and which they are if they are few."""
    names = sorted(found)
    return f"{len(names)}" + (f": {', '.join(names)}" if 0 < len(names) <= 6 else "")


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node):
            statement = node.body[0]
            assert isinstance(statement, ast.Expr)
            assert isinstance(statement.value, ast.Constant)
            yield statement.value


def _text(docstring: ast.Constant) -> str:
    return str(docstring.value)


def _span(node: ast.stmt | ast.expr) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _blocks(text: str) -> Iterator[Function]:
    """Functions and methods, those within classes included."""
    yield from (block for block in cc_visit(text) if isinstance(block, Function))


def _code_lines(text: str, tree: ast.Module) -> int:
    documented = {
        line for node in _docstrings(tree) for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    with_code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in _CODELESS
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(with_code - documented)


def _circles(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Groups of modules that import each other, directly or in a round."""
    modules = {_module(path): tree for path, tree in trees.items()}
    graph = {name: _imports(name, tree, modules.keys()) for name, tree in modules.items()}
    reach = {name: _reachable(name, graph) for name in graph}
    seen: set[str] = set()
    for name in sorted(graph):
        circle = {other for other in reach[name] if name in reach[other]}
        if circle and name not in seen:
            seen |= circle
            yield f"{name} and {len(circle) - 1} more"


def _module(path: Path) -> str:
    parts = (PACKAGE, *path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, tree: ast.Module, modules: Collection[str]) -> set[str]:
    """Modules of the package that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return {module for module in found if module in modules} - {name}


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(graph[name])
    return found


if __name__ == "__main__":
    main()
