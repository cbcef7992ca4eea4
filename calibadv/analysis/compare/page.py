"""The report as files: report.html, report.md and the figure for a README."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from calibadv.analysis.compare.arms import Arm
from calibadv.analysis.compare.charts import MAX_BANDS, chart_svg
from calibadv.analysis.compare.curve_docs import curve_description
from calibadv.analysis.compare.palette import styles
from calibadv.analysis.compare.sections import Section, window_width
from calibadv.analysis.compare.summary import Results

_NOTHING = "\u2013"


def render_html(
    results: Results, timing: Mapping[str, Any], arms: Sequence[Arm], drawn: Sequence[tuple[Section, Sequence[str]]]
) -> str:
    """Render report.html."""
    from markupsafe import Markup

    sections = [
        {
            "title": section.title,
            "constant": section.constant,
            "single": section.single,
            "charts": [
                {"tag": chart.tag, "meaning": curve_description(chart.tag), "svg": Markup(svg)}
                for chart, svg in zip(section.charts, pictures, strict=True)
            ],
        }
        for section, pictures in drawn
    ]
    legend = [
        {"name": arm.name, "index": index, "style": style}
        for index, (arm, style) in enumerate(zip(arms, styles(len(arms)), strict=True))
    ]
    return _render("page.html", escape=True, **_shared(results, timing, arms), sections=sections, legend=legend)


def render_markdown(results: Results, timing: Mapping[str, Any], arms: Sequence[Arm], has_figure: bool) -> str:
    """Render report.md, which has no curves."""
    shared = _shared(results, timing, arms)
    return _render("report.md", escape=False, **shared, has_figure=has_figure, has_bands=len(arms) <= MAX_BANDS)


def draw_charts(sections: Sequence[Section], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Draw every chart."""
    charts = [chart for section in sections for chart in section.charts]
    for number, chart in enumerate(charts):
        yield chart.tag, chart_svg(chart, names, f"c{number}-")


def _render(name: str, escape: bool, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("calibadv.analysis.compare"),
        autoescape=escape,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": _share,
        "figure": partial(_numbers, form="{:.3f}"),  # 0.652 [0.561, 0.731]
        "signed": partial(_numbers, form="{:+.3f}"),  # +0.052 [-0.061, +0.131]
        "cell": _cell,
        "code": _code,
        "duration": _duration,
    }
    return environment.get_template(name).render(**values)


def _shared(results: Results, timing: Mapping[str, Any], arms: Sequence[Arm]) -> dict[str, Any]:
    seeds = sorted({run["seed"] for run in results["runs"]}, key=lambda seed: (seed is None, seed or 0))
    by_seed = {(run["arm"], run["seed"]): run for run in results["runs"]}
    return {
        "results": results,
        "timing": timing,
        "seeds": seeds,
        "run_of": lambda arm, seed: by_seed.get((arm, seed)),
        "untrained_in": _untrained_in,
        "some_collapsed": any(run.get("collapsed") for run in results["runs"]),
        "several_starts": len(results["untrained"]) > 1,
        "window": window_width(arms),
        "made_with": _made_with(results),
        "validated": _validated(results),
        "command": timing.get("command"),
        "interval_scopes": _interval_scopes(results),
    }


def _untrained_in(start: Mapping[str, Any], seed: int | None) -> str:
    """F1 before training with a seed: the common one, or that of the seed if they differ."""
    if start["seeds"] is None:
        return f"{start['f1']['mean']:.3f}"
    by_seed = dict(zip(start["seeds"], start["f1"]["by_run"], strict=True))
    return f"{by_seed[seed]:.3f}" if seed in by_seed else _NOTHING


def _made_with(results: Results) -> dict[str, str]:
    """Versions, threads, devices and machines of the runs, each with all values that occur."""
    found: dict[str, dict[str, None]] = {}
    for run in results["runs"]:
        values = {
            "threads": run["threads"],
            "device": run["device"],
            **(run["versions"] or {}),
            **(run["machine"] or {}),
        }
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
    return {name: " / ".join(values) for name, values in found.items()}


def _validated(results: Results) -> str:
    """Number of questions and steps of the validations, if all finished runs agree; else empty."""
    counts = {arm["questions"] for arm in results["arms"] if arm["finished"]}
    steps = {tuple(row["step"] for row in run["validations"]) for run in results["runs"] if run["finished"]}
    if len(counts) != 1 or len(steps) != 1 or None in counts:
        return ""
    return f"on {counts.pop()} questions at the rollout steps {', '.join(map(str, steps.pop()))}"


def _interval_scopes(results: Results) -> str:
    """The units that the intervals are over: once if they are the same for all arms."""
    by_kind: dict[str, list[str]] = {}
    for arm in results["arms"]:
        by_kind.setdefault(arm["over"], []).append(arm["name"])
    if len(by_kind) == 1:
        return next(iter(by_kind))
    return "; ".join(f"{kind} for {', '.join(names)}" for kind, names in by_kind.items())


def _share(collapsed: Mapping[str, Any]) -> str:
    """``1 of 10 [0.02, 0.40]``."""
    return f"{collapsed['runs']} of {collapsed['of']} [{collapsed['low']:.2f}, {collapsed['high']:.2f}]"


def _numbers(entry: Mapping[str, Any] | None, form: str) -> str:
    if entry is None:
        return _NOTHING
    mean = form.format(entry["mean"])
    if entry["low"] is None:
        return mean
    return f"{mean} [{form.format(entry['low'])}, {form.format(entry['high'])}]"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _cell(value: Any) -> str:
    """Text escaped for a cell of a Markdown table."""
    text = " ".join(str(value).split())
    for character in "\\|<`*_[":
        text = text.replace(character, f"\\{character}" if character != "<" else "&lt;")
    return text


def _code(value: str) -> str:
    """Text as inline code in Markdown."""
    return "`" + value.replace("`", "'").replace("|", "\\|") + "`" if value else _NOTHING
