"""Colors and line styles of the arms: distinct for color-blind readers, in print, and on light and dark pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Hues after Okabe and Ito, shifted until text of that color can be read on white, and on near-black.
_LIGHT = ("#0065b0", "#c44700", "#00805c", "#a23b82", "#866300", "#1d87bd", "#85204f", "#555555")
_DARK = ("#58a9ff", "#ff8f52", "#35cda1", "#e796cb", "#e5c244", "#8edaff", "#ea7ba6", "#bdbdbd")
_DASHES: tuple[Any, ...] = (
    "solid",
    (0, (5, 1.5)),
    (0, (1.5, 1.5)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (9, 3)),
    (0, (4, 1.5, 1.2, 1.5, 1.2, 1.5)),
    (0, (2.5, 3)),
)


@dataclass(frozen=True, slots=True)
class Style:
    """Color of an arm on a light and on a dark page, and its line style."""

    light: str
    dark: str
    dash: Any  # as matplotlib takes it

    @property
    def dash_array(self) -> str:
        """The line style, as SVG takes it."""
        return "none" if self.dash == "solid" else " ".join(str(2 * length) for length in self.dash[1])


def styles(count: int) -> list[Style]:
    """Return the styles of so many arms."""
    return [
        Style(_LIGHT[index % len(_LIGHT)], _DARK[index % len(_DARK)], _DASHES[index % len(_DASHES)])
        for index in range(count)
    ]
