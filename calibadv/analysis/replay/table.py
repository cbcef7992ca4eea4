"""Tables of a comparison of methods for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from calibadv.analysis.replay.arms import ReplayArm
from calibadv.analysis.replay.results import SIGNS, TURN_KINDS, ArmResults, Disagreement, DisputedTurn, ReplayResults
from calibadv.runs.paths import short_names

# The end of a message holds its query or its answer.
_SHOWN_CHARACTERS = 100


def print_results(results: ReplayResults, arms: Sequence[ReplayArm]) -> None:
    """Print the effect of each method, and the turns on which methods differ most."""
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"{_counts(results)}\n")
    if results.lone_groups:
        console.print(
            f"warning: {_plural(results.lone_groups, 'group')} of a single rollout, as in files of validation, test "
            "and prediction: without a group to compare with, its advantages mean nothing\n",
            style="yellow",
            soft_wrap=True,
        )
    console.print(_summary(results))
    for arm in arms:
        if arm.ignored_settings:
            console.print(
                f"{arm.name}: no effect on the advantages of given rollouts: {', '.join(arm.ignored_settings)}"
            )
    names = _names(results.files)
    for disagreement in results.disagreements:
        console.print()
        for part in _disagreement(disagreement, names):
            console.print(part)


def _counts(results: ReplayResults) -> str:
    left_out = results.rollouts - results.trained_rollouts
    untrained = f" ({left_out:,} of them not trained)" if left_out else ""
    files = f"{_plural(results.batches, 'step')} of {_plural(len(results.files), 'file')}"
    return f"{_plural(results.rollouts, 'rollout')}{untrained} in {_plural(results.groups, 'group')}, {files}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _summary(results: ReplayResults) -> Table:
    first = results.arms[0].name
    distances = {disagreement.arms[1]: disagreement.mass for disagreement in results.disagreements}
    titles = [f"{kind}\nmass {sign}" for kind in TURN_KINDS for sign in "+-"]
    titles += ["softened\nturns", "zeroed\ngroups", "tied\ngroups"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\narm", overflow="fold")
    for title in titles + ([f"differs\nfrom {first}"] if distances else []):
        table.add_column(title, justify="right")
    for arm in results.arms:
        masses = [_number(arm.calibrated[kind][f"{side}_mass"]) for kind in TURN_KINDS for side in SIGNS]
        cells = [arm.name, *masses, _softened(arm), f"{arm.zeroed_groups:,}", f"{arm.tied_groups:,}"]
        table.add_row(*cells, *([_number(distances.get(arm.name))] if distances else []))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _softened(arm: ArmResults) -> str:
    share = f" ({arm.softened_turns / arm.punished_turns:.0%})" if arm.softened_turns else ""
    return f"{arm.softened_turns:,}{share}"


def _names(files: Sequence[str]) -> dict[str, str]:
    """Prefixes that tell the files apart; empty for a single file."""
    if len(files) == 1:
        return {files[0]: ""}
    return {file: f"{name}, " for file, name in zip(files, short_names([Path(file) for file in files]), strict=True)}


def _disagreement(disagreement: Disagreement, names: dict[str, str]) -> Iterator[RenderableType]:
    first, second = disagreement.arms
    scaled = second if disagreement.scale == 1 else f"{second} x {disagreement.scale:.3g}"
    if not disagreement.mass:
        yield f"{scaled} gives the same advantages as {first}"
    elif disagreement.turns:
        yield Text(f"{scaled} differs from {first} most on", "bold")
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in (first, scaled, "tokens", "difference"):
            table.add_column(title, justify="right")
        table.add_column("turn", overflow="fold")
        for turn in disagreement.turns:
            one, other = turn.advantages
            numbers = [f"{one:+.2f}", f"{other * disagreement.scale:+.2f}", f"{turn.tokens:,}"]
            table.add_row(*numbers, _number(turn.difference), _turn(turn, names[turn.file]))
        yield table


def _turn(turn: DisputedTurn, file: str) -> Text:
    kind = "answer" if turn.kind == "answer" else f"search {turn.turn + 1}"
    position = f"{file}step {turn.step}, {turn.question_id}, sample {turn.sample}, {kind}"
    message = _printable(turn.text)
    shown = message if len(message) <= _SHOWN_CHARACTERS else f"...{message[-_SHOWN_CHARACTERS:]}"
    return Text.assemble(_printable(position), "\n", (_printable(turn.question), "dim"), "\n", (shown, "italic"), "\n")


def _printable(text: str) -> str:
    """Text as one line without control characters, which a terminal might execute."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))
