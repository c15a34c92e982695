"""A comparison in the terminal: one row per run with its headlines and its differing parameters."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.review.comparison import Comparison, Figure
from flows.review.comparison_charts import short, varied
from flows.review.comparison_page import plain
from flows.review.run import Run

LONGEST = 20
"""Largest number of characters of a parameter's value."""
FIRST = 2
"""Number of headlines before the parameters."""


class _Column(NamedTuple):
    title: str
    cells: Sequence[Text]

    @property
    def width(self) -> int:
        return max(len(self.title), *(cell.cell_len for cell in self.cells))


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a comparison: best run first, the champion with a star, best figures green, as many columns as fit."""
    names = _Column("run", [_name(run) for run in comparison.runs])
    figures = [_figure(figure, len(comparison.runs)) for figure in comparison.figures]
    keys = varied(comparison)
    params = [
        _Column(_clean(label), [_value(value) for value in comparison.differing[key]])
        for key, label in zip(keys, short(keys), strict=True)
    ]
    table = Table(header_style="dim", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(names.title, no_wrap=True)
    shown, left_out, room = [names], [], console.width - names.width - 2
    for column in [*figures[:FIRST], *params, *figures[FIRST:]]:
        if column.width > room:
            left_out.append(column.title)
            continue
        shown.append(column)
        room -= column.width + 2
        table.add_column(Text(column.title), justify="right", no_wrap=True)
    for cells in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*cells)
    console.print(table)
    if left_out:
        console.print(Text(f"columns that do not fit here, see the page: {', '.join(left_out)}", "dim"))
    for run in comparison.runs:
        for warning in run.warnings:
            console.print(Text(f"{_clean(run.name)}: {_clean(warning)}", "yellow"))


def _name(run: Run) -> Text:
    name = Text.assemble(("★ ", "yellow") if run.is_champion else "  ", (_cut(_clean(run.name), 32), "bold"))
    if run.version not in (None, run.name):
        name.append(f" {_clean(str(run.version))}", "dim")
    if run.state in ("unfinished", "failed"):
        name.append(f" {run.state}", "red")
    return name


def _figure(figure: Figure, runs: int) -> _Column:
    cells = [Text(figure.shown(run), "green" if run in figure.best else "") for run in range(runs)]
    return _Column(figure.headline.label, cells)


def _value(value: object) -> Text:
    return Text(_cut(_clean(plain(value)), LONGEST))


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _clean(text: str) -> str:
    """Replace unprintable characters, which could control the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
