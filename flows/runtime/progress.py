"""Progress bars with time left, nested in the order in which they are opened.

On a terminal, each bar is a line below its outer bar, and disappears when done. In a pipe or file, a bar prints a line
every few seconds with its outer bars' names; in a JSON log, a record. A stage's bars are inside the run's bar. With
`--quiet` there are no bars.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm.auto import tqdm

from flows.runtime import logs

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10
RUN = "PEFTCORE_RUN"
"""Environment variable with a stage's position in a run: "3/7" if three of seven stages are done."""
LINE = "{desc}: {percentage:3.0f}%, {n_fmt} of {total_fmt} {unit}s, {elapsed} gone, {remaining} left{postfix}"

_open: list[Any] = []
"""Open bars, the outermost first."""


class _Lines:
    """Turns redraws of one line into separate lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.last = ""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and line != self.last:  # a bar redraws when it closes
            if logs.is_json():
                logger.info("%s", line)
            else:
                self.stream.write(line + "\n")
            self.last = line

    def flush(self) -> None:
        self.stream.flush()


class _Bar(tqdm):
    """A bar that can contain others while it is open."""

    name: str
    whole: Any = None

    def update(self, n: float | None = 1) -> bool | None:
        if self.whole is not None:
            self.whole.update(n)
        return super().update(n)

    def close(self) -> None:
        _open[:] = [bar for bar in _open if bar is not self]  # tqdm compares bars by position
        super().close()
        if len(_open) == 1 and isinstance(_open[0], _Run):
            _open[0].close()


class _Run(_Bar):
    """The bar of the run that this process is a stage of; it advances from stage to stage only."""


def progress(total: int, description: str, unit: str = "step", start: int = 0, part_of: Any = None) -> Any:
    """Open a `tqdm` bar on stderr, as a context manager: `bar.update(n)`, `bar.set_postfix(loss="2.7")`.

    Args:
        total: Units of the whole work.
        description: Name of the work.
        unit: Name of a unit, singular.
        start: Units that an earlier run has done; they do not count for the speed.
        part_of: A bar that advances with this one.
    """
    terminal = sys.stderr.isatty() and not logs.is_json()
    if not _open and (place := os.environ.get(RUN)):
        _open.append(_run_bar(*map(int, place.split("/")), terminal=terminal))
    outer = [bar.name for bar in _open]
    stays = all(isinstance(bar, _Run) for bar in _open)
    bar = _Bar(
        total=total,
        initial=start,
        desc="  " * len(outer) + description if terminal else " > ".join([*outer, description]),
        unit=unit,
        position=len(outer) if terminal else 0,
        leave=stays or not terminal,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.2 if terminal else SECONDS_BETWEEN_LINES,
        ncols=None if terminal else 160,
        dynamic_ncols=terminal,
        bar_format=None if terminal else LINE,
        disable=logs.is_quiet(),
    )
    bar.name, bar.whole = description, part_of
    _open.append(bar)
    return bar


def _run_bar(done: int, total: int, terminal: bool) -> _Run:
    bar = _Run(
        total=total,
        initial=done,
        file=sys.stderr,
        leave=False,
        disable=not terminal or logs.is_quiet(),  # in a pipe only its name shows, in front of every line
        dynamic_ncols=True,
        bar_format="run: stage {n_fmt} of {total_fmt} done |{bar}|",
    )
    bar.name = f"run, stage {done + 1} of {total}"
    return bar


@contextmanager
def bars_closed() -> Iterator[None]:
    """Close bars that the body leaves open; a failing training loop does not call its callbacks."""
    before = len(_open)
    try:
        yield
    finally:
        while len(_open) > before:
            _open[-1].close()
