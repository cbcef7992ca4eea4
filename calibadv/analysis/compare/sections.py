"""Sections of the report: the curves of each, and their bands over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calibadv.analysis.compare.arms import Arm
from calibadv.analysis.compare.charts import Chart
from calibadv.analysis.compare.curves import Curve, seed_band, step_windows

# In this order, each with the curves of a prefix.
_GROUPS = {
    "val": "Validation",
    "stability": "Stability",
    "reward": "Reward",
    "advantage": "Advantage",
    "credit": "Credit",
    "filter": "Filter",
    "rollout": "Rollouts",
    "update": "Updates",
}
_BY_SOURCE, _OTHER = "Validation by data source", "Other"
# What people theme for first.
_FIRST = ("val/f1", "val/em", "val/format_valid", "val/searches")


@dataclass(frozen=True, slots=True)
class Section:
    """The charts of a group of curves."""

    title: str
    charts: Sequence[Chart]  # in the order of the runs' curves
    constant: Sequence[tuple[str, float]]  # curves that are the same number everywhere, with it
    single: Sequence[str]  # curves that have one step only


def curve_sections(arms: Sequence[Arm]) -> list[Section]:
    """Sort the curves of all arms into sections."""
    titles: dict[str, list[str]] = {title: [] for title in (*_GROUPS.values(), _BY_SOURCE, _OTHER)}
    for tag in _ordered_tags(arms):
        titles[_title(tag)].append(tag)
    sections = (_section(title, members, arms) for title, members in titles.items())
    return [section for section in sections if section.charts or section.constant or section.single]


def _ordered_tags(arms: Sequence[Arm]) -> list[str]:
    tags = dict.fromkeys(tag for arm in arms for run in arm.runs for tag in run.curves)
    return sorted(tags, key=lambda tag: _FIRST.index(tag) if tag in _FIRST else len(_FIRST))


def _title(tag: str) -> str:
    prefix = tag.partition("/")[0]
    return _BY_SOURCE if prefix == "val" and tag.count("/") > 1 else _GROUPS.get(prefix, _OTHER)


def _section(title: str, tags: Sequence[str], arms: Sequence[Arm]) -> Section:
    charts, constant, single = [], [], []
    for tag in tags:
        curves = _curves_of(tag, arms)
        values = {value for curve in curves for value in curve.values()}
        if len(values) == 1:
            constant.append((tag, values.pop()))
        elif len({step for curve in curves for step in curve}) == 1:
            single.append(tag)
        else:
            found = make_chart(tag, arms)
            charts += [found] if found.bands else []
    return Section(title, charts, constant, single)


def _curves_of(tag: str, arms: Sequence[Arm]) -> list[Curve]:
    return [run.curves[tag] for arm in arms for run in arm.runs if tag in run.curves]


def make_chart(tag: str, arms: Sequence[Arm]) -> Chart:
    """The bands of one curve over the seeds of each arm."""
    members = {index: [run.curves[tag] for run in arm.runs if tag in run.curves] for index, arm in enumerate(arms)}
    grid = step_windows(curve for curves in members.values() for curve in curves)
    bands = {index: seed_band(curves, grid) for index, curves in members.items() if curves}
    return Chart(tag, {index: found for index, found in bands.items() if len(found.steps)})


def window_width(arms: Sequence[Arm]) -> int:
    """Number of neighbouring steps over which the longest curves are averaged."""
    curves = [curve for arm in arms for run in arm.runs for curve in run.curves.values()]
    return max((len(window) for window in step_windows(curves)), default=1)
