import io
import sys

import pytest

from flows import progress as module
from flows.progress import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_whole_lines_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress(1000, "train") as bar:
        for _ in range(1000):
            bar.update(1)
    lines = pipe.getvalue().splitlines()
    assert "\r" not in pipe.getvalue() and len(lines) == 2  # the first and the last: it took no ten seconds
    assert lines[-1].startswith("train: 100%, 1000 of 1000 steps")


def test_a_pipe_is_told_how_long_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0)
    with progress(10, "train") as bar:
        bar.set_postfix({"loss": "2.7"}, refresh=False)
        for _ in range(5):
            bar.update(1)
    assert "50%, 5 of 10 steps, 00:00 gone, 00:00 left, loss=2.7" in pipe.getvalue()


def test_a_terminal_gets_one_moving_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(10, "train", start=4) as bar:
        bar.update(6)
    assert terminal.getvalue().count("\n") == 1 and "\r" in terminal.getvalue()
    assert "10/10" in terminal.getvalue()
