"""An agent with three tools: two search engines over two corpora, and a calculator.

    PYTHONPATH=docs/examples calibadv fit --config quickstart --config docs/examples/custom_environment.yaml

The policy writes ``<search> ... </search>`` as ever; the protocol decides by the text which tool is meant.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from typing_extensions import override

from calibadv.errors import ToolError
from calibadv.interfaces import Retriever, Tool
from calibadv.protocol import SearchProtocol
from calibadv.types import Message, ScoredDocument, ToolCall, ToolResult
from calibadv.world import embedded_world

_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Calculator(Tool):
    """Compute sums, differences, products and quotients."""

    name = "calculator"
    description = "Compute an expression such as 2 * (3 + 4)."
    parameters: Mapping[str, Any] = {"type": "object", "properties": {"expression": {"type": "string"}}}

    @override
    def call(self, arguments: Sequence[Mapping[str, Any]]) -> list[ToolResult | ToolError]:
        return [self._compute(str(given["expression"])) for given in arguments]

    def _compute(self, expression: str) -> ToolResult | ToolError:
        try:
            return ToolResult(text=f"{_value(ast.parse(expression, mode='eval').body):g}")
        except (SyntaxError, ArithmeticError, KeyError, TypeError) as error:
            return ToolError(f"'{expression}' cannot be computed ({error})")  # fails the rollout that asked, alone


def _value(node: Any) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)
    return float(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))


class TitleSearch(Retriever):
    """Find documents of the embedded world by the words of their titles.

    Args:
        kinds: Kinds of documents that are searched, such as ``film``.
        top_k: Documents per search.
    """

    def __init__(self, kinds: list[str], top_k: int = 2) -> None:
        self.top_k = top_k
        self.corpus = [document for document in embedded_world().documents if document.id.split("-")[0] in kinds]

    @override
    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        return [self._search(set(query.split()), top_k) for query in queries]

    def _search(self, words: set[str], top_k: int) -> list[ScoredDocument]:
        scored = [ScoredDocument(d, float(len(words & set(d.title.split())))) for d in self.corpus]
        found = sorted((hit for hit in scored if hit.score), key=lambda hit: -hit.score)
        return found[:top_k]


@dataclass
class RoutedProtocol(SearchProtocol):
    """Send a query to the calculator if it holds a digit, to ``works`` if it asks for their relations, else on."""

    tools: ClassVar[tuple[str, ...]] = ("works", "others", "calculator")
    _WORKS: ClassVar[set[str]] = {"director", "composer", "author", "publisher", "founder", "headquarters", "singer"}

    @override
    def parse(self, text: str) -> Message:
        message = super().parse(text)
        return replace(message, calls=tuple(self._route(call.arguments["query"]) for call in message.calls))

    def _route(self, query: str) -> ToolCall:
        if any(character.isdigit() for character in query):
            return ToolCall("calculator", {"expression": query})
        return ToolCall("works" if self._WORKS & set(query.split()) else "others", {"query": query})
