"""The environment of an episode: it runs the calls of messages through its tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from calibadv.errors import ToolError, UserError, naming_part, shown
from calibadv.interfaces import Tool
from calibadv.types import Metrics, ToolCall, ToolResult

Outcome = list[ToolResult] | ToolError
"""The results of the calls of one message, or the error of the first that failed."""


class Environment:
    """Runs calls through tools, batched over all messages that wait.

    Each tool has a name of its own. With several, the ids of documents are prefixed by the tool that found them, so
    that none are mixed up.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        names = [tool.name for tool in tools]
        if not names:
            raise UserError("model.tools is empty; give at least one tool, or model.retriever")
        if len(set(names)) < len(names):
            raise UserError(f"two tools of model.tools are called '{max(names, key=names.count)}'; names are unique")
        self.tools = list(tools)

    def step(self, messages: Sequence[Sequence[ToolCall]]) -> list[Outcome]:
        """Run the calls of some messages."""
        results: list[list[Any]] = [[None] * len(calls) for calls in messages]
        for tool, places in self._places(messages).items():
            found = _run(tool, [messages[index][number] for index, number in places])
            for (index, number), result in zip(places, found, strict=True):
                results[index][number] = self._own(tool, result)
        return [_outcome(own) for own in results]

    def _places(self, messages: Sequence[Sequence[ToolCall]]) -> dict[Tool, list[tuple[int, int]]]:
        """Find the calls of each tool: the indices of message and call."""
        tools = {tool.name: tool for tool in self.tools}
        places: dict[Tool, list[tuple[int, int]]] = {}
        for index, calls in enumerate(messages):
            for number, call in enumerate(calls):
                if call.tool not in tools:
                    raise UserError(f"the protocol calls '{call.tool}', and the tools are {', '.join(sorted(tools))}")
                places.setdefault(tools[call.tool], []).append((index, number))
        return places

    def metrics(self) -> Metrics:
        """Return the curves of the tools, ``retrieval/...`` or, of several tools, ``retrieval/<tool>/...``."""
        several = len(self.tools) > 1
        return {
            f"retrieval/{tool.name}/{name}" if several else f"retrieval/{name}": value
            for tool in self.tools
            for name, value in tool.metrics().items()
        }

    def _own(self, tool: Tool, result: ToolResult | ToolError) -> ToolResult | ToolError:
        if len(self.tools) == 1 or isinstance(result, ToolError) or result.documents is None:
            return result
        documents = tuple(replace(document, id=f"{tool.name}/{document.id}") for document in result.documents)
        return replace(result, documents=documents)


def _outcome(results: list[ToolResult | ToolError]) -> Outcome:
    failed = next((result for result in results if isinstance(result, ToolError)), None)
    return failed or [result for result in results if isinstance(result, ToolResult)]


def _run(tool: Tool, calls: Sequence[ToolCall]) -> Sequence[ToolResult | ToolError]:
    """Call a tool, which may be a user's: its results are checked, and its errors taken apart."""
    name = type(tool).__name__
    try:
        with naming_part(f"{name}.call", "; mend it, or return a ToolError for a call that cannot be made"):
            results: Any = tool.call([call.arguments for call in calls])
    except ToolError as error:
        return [error] * len(calls)
    return _checked(results, len(calls), name)


def _checked(results: Any, calls: int, name: str) -> Sequence[ToolResult | ToolError]:
    if not isinstance(results, list | tuple) or len(results) != calls:
        what = f"{len(results)} results" if isinstance(results, list | tuple) else shown(results)
        raise UserError(f"{name}.call returned {what} for {calls} calls; it must be a list with one for each")
    wrong = [result for result in results if not isinstance(result, ToolResult | ToolError)]
    if wrong:
        raise UserError(f"{name}.call returned {shown(wrong[0])}; a result is a ToolResult or a ToolError")
    return results
