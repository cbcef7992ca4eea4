"""The search tool: a retriever, as messages call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from calibadv.errors import ToolError, UserError
from calibadv.interfaces import Retriever, Tool
from calibadv.retrieval.outcomes import search_outcomes
from calibadv.types import Metrics, ToolResult


class SearchTool(Tool):
    """Search with a retriever.

    Args:
        retriever: Finds documents, ``top_k`` per search.
        name: By which messages call the tool.
        description: One sentence for the prompt.
    """

    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"query": {"type": "string"}},
        "required": ["query"],
    }

    def __init__(
        self, retriever: Retriever, name: str = "search", description: str = "Find documents about a query."
    ) -> None:
        self.retriever = retriever
        self.name = name
        self.description = description

    @override
    def call(self, arguments: Sequence[Mapping[str, Any]]) -> list[ToolResult | ToolError]:
        outcomes = search_outcomes(self.retriever, [str(given["query"]) for given in arguments], self.retriever.top_k)
        return [
            outcome if isinstance(outcome, ToolError) else ToolResult(tuple(scored.document for scored in outcome))
            for outcome in outcomes
        ]

    @override
    def metrics(self) -> Metrics:
        return self.retriever.metrics()


def make_tools(retriever: Retriever | None, tools: Sequence[Tool] | None) -> Sequence[Tool]:
    """Return the tools of an agent: those that are given, or the search with a retriever."""
    if retriever is not None and tools is not None:
        raise UserError(
            "model.retriever and model.tools are both set; give one: SearchTool makes a tool of a retriever"
        )
    if retriever is not None:
        return [SearchTool(retriever)]
    if tools is None:
        raise UserError("model.retriever is missing; give it, a config of retrievers/, or model.tools")
    return tools
