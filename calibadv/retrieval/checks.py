"""Checks of arguments that several retrievers take."""

from __future__ import annotations

from collections.abc import Sequence

from calibadv.errors import UserError


def check_at_least(least: int, **values: int | None) -> None:
    """Refuse a value below a limit; None stands for a default and passes."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")


def check_search(queries: Sequence[str], top_k: int) -> None:
    """Refuse invalid arguments of ``Retriever.search``."""
    if isinstance(queries, str):
        raise UserError(f"queries is the text {queries!r:.60}; it must be a list of texts: put it in brackets")
    check_at_least(1, top_k=top_k)


def check_fetch_k(top_k: int, fetch_k: int) -> None:
    """Refuse to return more documents than are fetched."""
    check_at_least(1, top_k=top_k)
    if fetch_k < top_k:
        raise UserError(f"fetch_k is {fetch_k}; it must be at least top_k, which is {top_k}")
