"""Charts of curves: SVG with the colors of the surrounding page, and a standalone figure for a README."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calibadv.analysis.compare.curves import Band
from calibadv.analysis.compare.palette import Style, styles

# Placeholder colors, replaced in the SVG. matplotlib does not write black, the default of SVG.
_INK, _GRID = "#010203", "#010204"
_NUMBER = re.compile(r"-?\d+\.\d+")
_PATH_DATA = re.compile(r'(?<= d=")[^"]*')
_STYLES: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "calibadv",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.linewidth": 0.6,
    "path.simplify": False,
    "text.parse_math": False,  # a name may hold dollar signs
    "text.usetex": False,
}
_FIGURE_SIZE = (7.6, 3.4)
_LOG_FROM = 50
_LABEL = 32
_LINE_POINTS = 10.5
# With more arms a figure shows no bands, since they would overlap too much.
MAX_BANDS = 4


@dataclass(frozen=True, slots=True)
class Chart:
    """The chart of one metric."""

    tag: str
    bands: Mapping[int, Band]  # of the arms that have the metric, by the arm's index


@dataclass(frozen=True, slots=True)
class _Theme:
    """Colors by arm, size in inches, colors of text and of the grid, title of the vertical axis."""

    colors: Sequence[str]
    size: tuple[float, float]
    ink: str
    grid: str
    title: str = ""


def chart_svg(chart: Chart, names: Sequence[str], prefix: str) -> str:
    """Draw a chart for a page that defines the colors ``--arm-0``, ``--arm-1``, ... and ``--grid``."""
    colors = [_placeholder_color(index) for index in range(len(names))]
    return _css_colors(_as_svg(_draw(chart, names, _Theme(colors, (4.9, 2.4), _INK, _GRID))), len(names), prefix)


def _css_colors(svg: str, arms: int, prefix: str) -> str:
    for index in range(arms):
        svg = svg.replace(_placeholder_color(index), f"var(--arm-{index})")
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}\1"', svg)
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{prefix}", svg)
    return re.sub(rf'id="{prefix}(arm-\d+)-(line|band|seed|label)-\d+"', r'class="arm \1 \2"', svg)


def _placeholder_color(arm: int) -> str:
    return f"#0a0b{arm:02x}"


def figure_svg(chart: Chart, names: Sequence[str], title: str) -> str:
    """Draw a standalone figure that follows the reader's light or dark mode."""
    theme = _Theme([_placeholder_color(index) for index in range(len(names))], _FIGURE_SIZE, _INK, _GRID, title)
    svg = _css_colors(_as_svg(_draw(_without_seed_lines(chart), names, theme)), len(names), "")
    chosen = styles(len(names))
    light = _variables([style.light for style in chosen], "#1f2328", "#d8dee4")
    dark = _variables([style.dark for style in chosen], "#e6edf3", "#3d444d")
    rules = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    head, opening, rest = svg.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{opening}{rules}{rest}\n'


def _variables(colors: Sequence[str], ink: str, grid: str) -> str:
    arms = "".join(f"--arm-{index}:{color};" for index, color in enumerate(colors))
    return f"color:{ink};--grid:{grid};{arms}"


def figure_png(chart: Chart, names: Sequence[str], title: str) -> bytes:
    """Draw the same figure in fixed colors on white."""
    colors = [style.light for style in styles(len(names))]
    figure = _draw(_without_seed_lines(chart), names, _Theme(colors, _FIGURE_SIZE, "#1f2328", "#d8dee4", title))
    return _saved(figure, format="png", dpi=160, facecolor="white", metadata={"Software": None})


def _without_seed_lines(chart: Chart) -> Chart:
    """The chart without seed lines and, with many arms, without bands: a figure cannot hide them."""
    bands = {index: replace(band, seeds=band.seeds[:0]) for index, band in chart.bands.items()}
    if len(bands) > MAX_BANDS:
        bands = {index: replace(band, low=band.mean, high=band.mean) for index, band in bands.items()}
    return Chart(chart.tag, bands)


def _draw(chart: Chart, names: Sequence[str], theme: _Theme) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLES):
        figure = Figure(figsize=theme.size)
        axes = figure.add_subplot()
        for index, (arm, band) in enumerate(chart.bands.items()):
            _draw_arm(axes, (index, len(chart.bands)), band, (arm, theme.colors[arm]), styles(len(names))[arm])
        _style_axes(axes, theme)
        _scale(axes, chart)
        width, height = theme.size
        labels = 0.12 + 0.066 * max(len(_short(names[arm])) for arm in chart.bands)  # inches
        left = 0.52 + 0.18 * bool(theme.title)
        figure.subplots_adjust(left=left / width, right=1 - labels / width, top=0.96, bottom=0.42 / height)
        _label(axes, chart, [_short(name) for name in names], theme.colors)
    return figure


def _draw_arm(axes: Any, order: tuple[int, int], band: Band, drawn_as: tuple[int, str], style: Style) -> None:
    arm, color = drawn_as
    index, count = order
    opacity = min(0.14, 0.5 / count)  # lines stay visible under many overlapping bands
    filled = axes.fill_between(band.steps, band.low, band.high, color=color, alpha=opacity, linewidth=0)
    filled.set_gid(f"arm-{arm}-band-0")
    for number, seed in enumerate(band.seeds):
        present = np.isfinite(seed)
        line = axes.plot(band.steps[present], seed[present], color=color, linewidth=0.6, alpha=0.45)[0]
        line.set_gid(f"arm-{arm}-seed-{number}")
    single = "o" if len(band.steps) == 1 else None
    line = axes.plot(
        band.steps, band.mean, color=color, linewidth=1.7, linestyle=style.dash, marker=single, zorder=3 + index / 100
    )[0]
    line.set_gid(f"arm-{arm}-line-0")


def _style_axes(axes: Any, theme: _Theme) -> None:
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.grid)
    axes.tick_params(color=theme.grid, labelcolor=theme.ink, labelsize=8, length=3, width=0.6)
    axes.grid(color=theme.grid, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("rollout step", color=theme.ink, fontsize=8, labelpad=2)
    axes.set_ylabel(theme.title, color=theme.ink, fontsize=8)
    axes.margins(x=0)


def _scale(axes: Any, chart: Chart) -> None:
    """Use a logarithmic axis, linear near 0, if a few large values would flatten all others."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    means = np.concatenate([band.mean for band in chart.bands.values()])
    lowest = min(band.low.min() for band in chart.bands.values())
    typical = float(np.median(means[means > 0])) if (means > 0).any() else 0.0
    if lowest >= 0 and typical > 0 and means.max() > _LOG_FROM * typical:
        axes.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(typical)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    """``0.25``, ``1000``, ``5e-4``: short at any magnitude."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _label(axes: Any, chart: Chart, names: Sequence[str], colors: Sequence[str]) -> None:
    """Write each arm's name beside the end of its line, shifted vertically to avoid overlap."""
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    ends = {arm: axes.transData.transform((0, band.mean[-1]))[1] for arm, band in chart.bands.items()}
    bottom = axes.get_window_extent().y0
    wanted = {arm: (end - bottom) * 72 / axes.figure.dpi for arm, end in ends.items()}
    for arm, position in _spread(wanted, height).items():
        text = axes.annotate(
            names[arm],
            (1, position / height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            color=colors[arm],
            fontsize=8,
            va="center",
            annotation_clip=False,
        )
        text.set_gid(f"arm-{arm}-label-0")


def _spread(wanted: Mapping[int, float], height: float) -> dict[int, float]:
    """Move positions apart, keeping their order, until neighbors are one line apart."""
    order = sorted(wanted, key=lambda arm: wanted[arm])
    line = min(_LINE_POINTS, height / max(len(order) - 1, 1))
    placed: list[float] = []
    for arm in order:
        placed.append(max(wanted[arm], placed[-1] + line) if placed else max(wanted[arm], 0.0))
    limit = height
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - line
    return dict(zip(order, placed, strict=True))


def _short(name: str) -> str:
    return name if len(name) <= _LABEL else name[: _LABEL - 1] + "…"


def _saved(figure: Any, **options: Any) -> bytes:
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context(_STYLES):
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _as_svg(figure: Any) -> str:
    """The ``<svg>`` element, without metadata, with coordinates to a tenth of a point."""
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    text = _saved(figure, format="svg", transparent=True, metadata=nothing).decode("utf-8")
    text = text[text.index("<svg") :].strip()
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL
    )
    text = _PATH_DATA.sub(lambda path: _compact(path[0]), text)
    text = re.sub(r"font: (\S+) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    return re.sub(r">\s+<", "><", text)


def _compact(path: str) -> str:
    rounded = _NUMBER.sub(lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), path)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", rounded).strip()
