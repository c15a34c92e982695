import io
import sys

import pytest

from flows.runtime import progress as module
from flows.runtime.progress import RUN, bars_closed, progress


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


def test_a_bar_inside_another_moves_below_it_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(2, "train") as outer:
        outer.update(1)
        with progress(3, "validation", "row") as inner:
            inner.update(3)
        outer.update(1)
    with progress(1, "merge") as after:
        after.update(1)
    written = terminal.getvalue()
    assert "\n\r  validation:" in written and "\x1b[A" in written  # one line down, and up again
    last = written.split("\r")
    assert any(line.startswith("train: 100%") and line.endswith("\n") for line in last)
    assert last[-1].startswith("merge: 100%")  # on the line after it: nothing is left open


def test_in_a_pipe_a_line_says_what_it_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress(2, "train") as outer:
        with progress(3, "validation", "row") as inner:
            inner.update(3)
        outer.update(2)
    lines = [line.partition(":")[0] for line in pipe.getvalue().splitlines()]
    assert lines == ["train", "train > validation", "train > validation", "train"]
    assert "\x1b" not in pipe.getvalue()


def test_what_an_error_leaves_open_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress(2, "run"):
        with pytest.raises(ValueError, match="broken"), bars_closed():
            progress(3, "train")
            progress(4, "validation")
            raise ValueError("broken")
        progress(5, "merge").close()
    assert "run > merge: " in pipe.getvalue()
    assert "validation > merge" not in pipe.getvalue()


def test_a_part_counts_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress(5, "evaluate", "row") as whole:
        for name, rows in (("losses", 3), ("answers", 2)):
            with progress(rows, name, "row", part_of=whole) as part:
                part.update(rows)
        assert whole.n == 5


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_stands_in_its_run(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stream = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv(RUN, "3/7")
    for name in ("train", "table"):
        with progress(2, name) as bar:
            bar.update(2)
            progress(1, "validation").close()
    assert module._open == []
    written = stream.getvalue()
    if terminal:
        assert written.count("run: stage 3 of 7 done") == 2 and "\n\r  train:   0%" in written
        assert [line.strip() for line in written.split("\r") if "100%" in line and line.endswith("\n")]  # it stays
    else:
        places = {line.partition(":")[0] for line in written.splitlines()}
        inside = {f"run, stage 4 of 7 > {name}" for name in ("train", "table")}
        assert places == inside | {f"{name} > validation" for name in inside}
