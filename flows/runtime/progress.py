"""Progress bars with an ETA, nested in the order in which they are opened.

On a terminal each is a moving line below the one it stands in, which goes when it is done; in a pipe or a file it is a
line every few seconds that says what it stands in, and in a JSON log a record. A stage that a run has started stands in
that run's own bar. With `--quiet` there are none.
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
"""Environment variable by which a stage knows its place in a run: "3/7" if three of seven stages are done."""
LINE = "{desc}: {percentage:3.0f}%, {n_fmt} of {total_fmt} {unit}s, {elapsed} gone, {remaining} left{postfix}"

_open: list[Any] = []
"""Bars that are open, the outermost first."""


class _Lines:
    """Turns a bar's redraws of one line into lines of their own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.last = ""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and line != self.last:  # a bar draws itself once more when it closes
            if logs.is_json():
                logger.info("%s", line)
            else:
                self.stream.write(line + "\n")
            self.last = line

    def flush(self) -> None:
        self.stream.flush()


class _Bar(tqdm):
    """A bar that others can stand in until it is closed."""

    name: str
    whole: Any = None

    def update(self, n: float | None = 1) -> bool | None:
        if self.whole is not None:
            self.whole.update(n)
        return super().update(n)

    def close(self) -> None:
        _open[:] = [bar for bar in _open if bar is not self]  # bars in one place count as equal
        super().close()
        if len(_open) == 1 and isinstance(_open[0], _Run):
            _open[0].close()


class _Run(_Bar):
    """The bar of the run that this process is a stage of; it moves on from stage to stage, not in one."""


def progress(total: int, description: str, unit: str = "step", start: int = 0, part_of: Any = None) -> Any:
    """A `tqdm` bar on stderr, to use as a context manager: `bar.update(n)`, `bar.set_postfix(loss="2.7")`.

    total, start: in units; start is what an earlier run has done and does not count for the speed. Opened while
    another is open, it stands in that one; part_of: a bar in whose units it counts too.
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
        disable=not terminal or logs.is_quiet(),  # in a pipe its name alone tells, in front of every line
        dynamic_ncols=True,
        bar_format="run: stage {n_fmt} of {total_fmt} done |{bar}|",
    )
    bar.name = f"run, stage {done + 1} of {total}"
    return bar


@contextmanager
def bars_closed() -> Iterator[None]:
    """Context that closes the bars it leaves open: a training loop that fails does not tell its callbacks."""
    before = len(_open)
    try:
        yield
    finally:
        while len(_open) > before:
            _open[-1].close()
