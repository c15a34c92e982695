"""A progress bar with an ETA: one moving line on a terminal, a line every few seconds in a pipe or a file."""

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 10
LINE = "{desc}: {percentage:3.0f}%, {n_fmt} of {total_fmt} {unit}s, {elapsed} gone, {remaining} left{postfix}"


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


def progress(total: int, description: str, unit: str = "step", start: int = 0) -> Any:
    """A `tqdm` bar on stderr, to use as a context manager: `bar.update(n)`, `bar.set_postfix(loss="2.7")`.

    total, start: in units; start is what an earlier run has done and does not count for the speed.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        desc=description,
        unit=unit,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.2 if terminal else SECONDS_BETWEEN_LINES,
        ncols=None if terminal else 100,
        dynamic_ncols=terminal,
        bar_format=None if terminal else LINE,
    )
