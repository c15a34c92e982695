"""Programs that answers hold: those that run, fail, exit early, never end, or take too much memory."""

import time
from pathlib import Path

import pytest

from flows.evaluation.scorers.program import code

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
MAIN = "import sys\nif __name__ == '__main__':\n    sys.exit(0)\n"


def test_a_program_has_to_pass_the_tests_of_its_row() -> None:
    score = code(tests="tests")
    row = {"tests": "assert add(1, 2) == 3"}
    assert score("", ADD, "", row) == 1
    assert score("", ADD.replace("+", "-"), "", row) == 0
    assert score("", "import sys\nsys.exit(0)", "", row) == 0, "the tests did not run"


def test_tests_may_be_the_reference_and_the_main_part_does_not_run_before_them() -> None:
    assert code(tests="reference")("", f"def one():\n    return 1\n{MAIN}", "assert one() == 1", {}) == 1


def test_without_tests_a_program_has_to_end_well() -> None:
    score = code()
    assert [score("", text, "", {}) for text in (MAIN, "import sys; sys.exit(3)")] == [1, 0]


def test_an_endless_program_is_stopped_with_those_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    open({str(mark)!r}, 'w')\n"
    assert code(seconds=0.5)("", child + "while True: pass", "", {}) == 0
    time.sleep(0.7)
    assert not mark.exists()


def test_memory_is_limited() -> None:
    assert code(memory_mb=512)("", "x = bytearray(1 << 30)", "", {}) == 0


def test_a_row_without_tests_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"no text in column tests; name it in data\.extra_columns"):
        code(tests="tests")("", ADD, "", {"id": "a"})


@pytest.mark.parametrize("options", [{"seconds": 0}, {"memory_mb": 1}])
def test_limits_that_stop_every_program_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="give more than 0, and at least 64"):
        code(**options)
