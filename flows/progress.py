"""Progress bars with an ETA, nested in the order in which they are opened.

On a terminal each is a moving line below the one it stands in, which goes when it is done; in a pipe or a file it is a
line every few seconds that says what it stands in.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 10
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
            self.stream.write(line + "\n")
            self.last = line

    def flush(self) -> None:
        self.stream.flush()


class _Bar(tqdm):
    """A bar that others can stand in until it is closed."""

    name: str

    def close(self) -> None:
        _open[:] = [bar for bar in _open if bar is not self]  # bars in one place count as equal
        super().close()


def progress(total: int, description: str, unit: str = "step", start: int = 0) -> Any:
    """A `tqdm` bar on stderr, to use as a context manager: `bar.update(n)`, `bar.set_postfix(loss="2.7")`.

    total, start: in units; start is what an earlier run has done and does not count for the speed. Opened while
    another is open, it stands in that one.
    """
    terminal = sys.stderr.isatty()
    outer = [bar.name for bar in _open]
    bar = _Bar(
        total=total,
        initial=start,
        desc="  " * len(outer) + description if terminal else " > ".join([*outer, description]),
        unit=unit,
        position=len(outer) if terminal else 0,
        leave=not outer or not terminal,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.2 if terminal else SECONDS_BETWEEN_LINES,
        ncols=None if terminal else 160,
        dynamic_ncols=terminal,
        bar_format=None if terminal else LINE,
    )
    bar.name = description
    _open.append(bar)
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
