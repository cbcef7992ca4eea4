"""Descriptions of the curves in one line each, read from docs/curves.md."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path

_TAG = re.compile(r"`([a-z_]+/[^`\s]+)`")
_ROW = re.compile(r"^\| (`.+?`) \| (.+) \|$", re.MULTILINE)
_LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")


@cache
def _page() -> str:
    package = Path(str(files("calibadv")))
    installed = package / "analysis" / "compare" / "curves.md"
    path = installed if installed.is_file() else package.parent / "docs" / "curves.md"
    return path.read_text("utf-8")


def _pattern(tag: str) -> re.Pattern[str]:
    """A tag of the page as a pattern: ``<source>`` matches one part of a name, ``...`` the rest of one."""
    return re.compile(re.sub(r"<[^>]*>", "[^/]+", re.escape(tag)).replace(re.escape("..."), ".+"))


@cache
def known_tags() -> tuple[re.Pattern[str], ...]:
    """The names of all curves, as patterns."""
    return tuple(_pattern(tag) for tag in dict.fromkeys(_TAG.findall(_page())))


@cache
def _definitions() -> list[tuple[re.Pattern[str], str]]:
    rows = [(tags, _LINK.sub(r"\1", text).replace("`", "")) for tags, text in _ROW.findall(_page())]
    return [(_pattern(tag), text) for tags, text in rows for tag in _TAG.findall(tags)]


def curve_description(tag: str) -> str:
    """Return the description of a curve; empty if it has none."""
    return next((text for pattern, text in _definitions() if pattern.fullmatch(tag)), "")
